import pytest
import torch

from kvplug_kernels.antidiagonal import antidiagonal, reference
from tests.kernels.paged_cache import paged_cache

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-5, torch.bfloat16: 2e-5}
CASES = [
    # of each request tokens and the first new one; block, H, G, D, S, stride, parts, columns
    ([(39, 0), (1, 0), (37, 36), (0, 0)], 32, 1, 3, 24, 16, 8, 1, 64),
    ([(75, 43), (64, 50)], 64, 1, 1, 64, 32, 16, 4, 16),
    ([(140, 117), (16, 3)], 64, 1, 4, 128, 64, 8, 1, 64),
    ([(150, 120)], 128, 1, 8, 64, 128, 16, 2, 16),
    ([(60, 39)], 16, 1, 2, 80, 48, 16, 1, 32),
    ([(290, 285)], 64, 2, 1, 32, 256, 8, 2, 16),
]


def plain(query, begin, keys, stride, scale, size):
    """One block and KV head in float64, number by number: query [t, G, D] at begin on, keys [T, D]
    -> share of each page of so many tokens."""
    stop = begin + len(query)
    queries = {begin + at: row for at, row in enumerate(query.double())}
    shares = torch.zeros(-(-len(keys) // size), dtype=torch.float64)
    groups = range(begin // stride, (stop - 1) // stride + 1)
    for i in groups:
        logits = []
        for j in range(min(i + 1, -(-len(keys) // stride))):
            total = torch.zeros(query.shape[1], dtype=torch.float64)
            for r in range(stride):
                at, token = i * stride + stride - 1 - r, j * stride + r
                if at in queries and token < len(keys):
                    total += queries[at] @ keys[token].double()
            logits.append(total * scale / stride)
        weights = torch.stack(logits, 1).softmax(1).mean(0)
        for j, weight in enumerate(weights):
            shares[j * stride // size] += weight / len(groups)
    return shares


class Chunk:
    """Blocks on a grid of the new tokens of some requests. Rows of queries and columns of the
    table that nobody may read are NaN, and pages of NaN."""

    def __init__(self, requests, block, H, G, D, S, dtype, device, less=0):
        self.cache = paged_cache([stop for stop, _ in requests], H, D, S, dtype, device)
        rows, self.of, start, pages = [0, 0], [0], [0], [0]  # an empty block first
        for request, (stop, begin) in enumerate(requests):
            while begin < stop:
                end = min(stop, begin // block * block + block)
                self.of.append(request)
                start.append(begin)
                pages.append(max(0, -(-end // S) - less))
                rows.append(rows[-1] + end - begin)
                begin = end
        seed = torch.Generator().manual_seed(rows[-1])
        query = torch.full((rows[-1] + 3, H + 1, G + 1, D), float("nan"))
        query[: rows[-1], :H, :G] = torch.randn(rows[-1], H, G, D, generator=seed)
        self.query = query.to(device, dtype)[:, :H, :G]
        self.bounds, self.start, self.pages = (
            torch.tensor(each, dtype=torch.int32, device=device) for each in (rows, start, pages)
        )
        table = self.cache.page_table[self.of].clone()
        held = set(table[table >= 0].tolist())
        stale = next(page for page in range(len(self.cache.keys)) if page not in held)
        beyond = torch.arange(table.shape[1], device=device) >= self.pages[:, None]
        self.table = table.masked_fill(beyond, stale)

    def arguments(self, stride, scale):
        return (
            self.query, self.bounds, self.start, self.cache.keys, self.table, self.pages, stride,
            scale,
        )  # fmt: skip

    def expected(self, stride, scale):
        n, P = self.table.shape
        S, H = self.cache.keys.shape[1:3]
        shares = torch.zeros(n, H, P, dtype=torch.float64)
        for row, begin, count in zip(
            range(n), self.start.tolist(), self.pages.tolist(), strict=True
        ):
            query = self.query[self.bounds[row] : self.bounds[row + 1]].cpu()
            seen = min(begin + len(query), count * S)
            if not len(query) or not seen:
                continue
            keys = self.cache.keys[self.table[row, :count].long()].flatten(0, 1)[:seen].cpu()
            for h in range(H):
                found = plain(query[:, h], begin, keys[:, h], stride, scale, S)
                shares[row, h, : len(found)] = found
        return shares.float()


def check(shares, chunk, stride, scale):
    expected = chunk.expected(stride, scale).to(shares.device)
    tolerance = TOLERANCE[chunk.query.dtype]
    torch.testing.assert_close(shares, expected, atol=tolerance, rtol=1e-4)
    seen = (chunk.pages > 0) & (chunk.bounds.diff() > 0)
    assert torch.allclose(shares.sum(2), seen[:, None].float(), atol=1e-5)


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("held", [1, 4 << 20])
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_definition(case, held, less, monkeypatch):
    """In products of one block, and of many; pages that are missing at the end are not seen."""
    monkeypatch.setattr(reference, "LOGIT_BYTES", held)
    *shape, stride, _, _ = case
    chunk = Chunk(*shape, torch.float32, "cpu", less)
    check(reference.antidiagonal(*chunk.arguments(stride, 0.3)), chunk, stride, 0.3)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_definition(case, dtype, device, poisoned_outputs, monkeypatch):
    """In tiles of several pages, and of parts of one."""
    from kvplug_kernels.antidiagonal import kernel

    *shape, stride, parts, columns = case
    monkeypatch.setattr(kernel, "COLUMNS", columns)
    monkeypatch.setattr(kernel, "parts_for", lambda programs, columns: parts)
    monkeypatch.setattr(kernel, "MOST_ROWS", 16)
    chunk = Chunk(*shape, dtype, device)
    check(antidiagonal(*chunk.arguments(stride, 0.3)), chunk, stride, 0.3)


def test_blocks_of_other_requests_share_nothing():
    """Equal tables as far as they go, but other keys behind; and a table that ends in a group."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(4, 16, 1, 8, generator=generator)
    query = torch.randn(30, 1, 2, 8, generator=generator)
    table = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 3, 2]], dtype=torch.int32)
    bounds = torch.tensor([0, 5, 17, 30], dtype=torch.int32)
    start = torch.tensor([16, 18, 10], dtype=torch.int32)
    pages = torch.tensor([2, 2, 2], dtype=torch.int32)
    together = antidiagonal(query, bounds, start, keys, table, pages, 8, 1.0)
    for b in range(3):
        rows = query[bounds[b] : bounds[b + 1]]
        ends = torch.tensor([0, len(rows)], dtype=torch.int32)
        one = slice(b, b + 1)
        alone = antidiagonal(rows, ends, start[one], keys, table[one], pages[one], 8, 1.0)
        torch.testing.assert_close(together[one], alone)


def test_wrong_shapes_say_what_they_wanted():
    query, keys = torch.zeros(4, 1, 2, 8), torch.zeros(3, 16, 1, 8)
    table = torch.zeros(1, 2, dtype=torch.int32)
    bounds, one = torch.tensor([0, 4], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="stride must divide the 16 tokens of a page, got 12"):
        antidiagonal(query, bounds, one, keys, table, one, 12, 1.0)
    with pytest.raises(ValueError, match=r"bounds must be \[n\+1=2\], got \[1\]"):
        antidiagonal(query, one, one, keys, table, one, 8, 1.0)
    with pytest.raises(ValueError, match=r"keys must be \[N=3, S=16, H=2, D=8\], got"):
        antidiagonal(query.expand(4, 2, 2, 8), bounds, one, keys, table, one, 8, 1.0)
