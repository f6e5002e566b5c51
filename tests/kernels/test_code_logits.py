import pytest
import torch

from kvplug_kernels.code_logits import code_logits, reference
from tests.kernels.coded_cache import coded_cache
from tests.kernels.paged_cache import random_query
from tests.kernels.test_key_codes import code


def plain(query, cache, bits):
    """The sum over channels, token by token."""
    S, H, D = cache.keys.shape[1:]
    B, Hq = query.shape[:2]
    out = torch.full((B, Hq, cache.page_table.shape[1] * S), float("-inf"), dtype=torch.double)
    for b, pages in enumerate(cache.full.tolist()):
        for t in range(pages * S):
            n = int(cache.page_table[b, t // S])
            for h in range(H):
                each = [code(cache.codes, n, h, d, t % S, S, bits) for d in range(D)]
                lo, step = cache.codes[n, h, :2].double()
                key = lo + step * torch.tensor(each).double()
                heads = slice(h * Hq // H, (h + 1) * Hq // H)
                out[b, heads, t] = query[b, heads].double() @ key
    return out


@pytest.mark.parametrize("bits, S", [(1, 16), (2, 16), (4, 6), (8, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_sums_over_channels(bits, S, dtype, monkeypatch):
    monkeypatch.setattr(reference, "PAGES", 2)
    cache = coded_cache([3 * S + 1, 0, S, 4 * S, 5], 2, 8, S, bits, dtype)
    query = random_query(cache, G=3)
    got = reference.code_logits(query, cache.codes, cache.page_table, cache.full, S, bits)
    torch.testing.assert_close(got.double(), plain(query, cache, bits), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits, error", [(4, 0.1), (2, 0.45), (1, 1.6)])
def test_logits_come_near_those_of_the_keys(bits, error):
    """32 normal keys span about 4.1 deviations: steps of 0.27, 1.4 and 4.1 for 4, 2 and 1 bits."""
    S, D = 32, 64
    cache = coded_cache([20 * S + 1], 1, D, S, bits)
    query = random_query(cache, G=2)
    inputs = (query, cache.codes, cache.page_table, cache.full, S, bits)
    got = reference.code_logits(*inputs)[0, :, : 20 * S]
    keys = cache.keys[cache.page_table[0, :20].long()].view(20 * S, D)
    exact = query[0] @ keys.T
    assert (got - exact).square().mean().sqrt() < error * exact.std()


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(
    "lengths, H, G, D, S, bits",
    [
        ([17], 1, 1, 64, 16, 1),
        ([33 * 16 - 1, 0, 5], 2, 3, 80, 16, 2),
        ([70, 16, 129], 1, 8, 128, 32, 4),
        ([300, 64, 65], 2, 4, 64, 64, 2),
        ([61], 1, 3, 160, 12, 2),
        ([61], 1, 3, 64, 12, 8),
    ],
)
def test_kernel_equals_reference(lengths, H, G, D, S, bits, dtype, device, poisoned_outputs):
    """Keys rounded to the cache's dtype add what its products would have lost."""
    cache = coded_cache(lengths, H, D, S, bits, dtype, device)
    inputs = (random_query(cache, G), cache.codes, cache.page_table, cache.full, S, bits)
    got, expected = code_logits(*inputs), reference.code_logits(*inputs)
    scale = expected[expected.isfinite()].std()
    torch.testing.assert_close(
        got / scale, expected / scale, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_pages_that_nobody_wants_are_not_scored(dtype, device, poisoned_outputs):
    cache = coded_cache([17 * 16, 0, 33], 2, 64, 16, 2, dtype, device)
    inputs = (random_query(cache, 3), cache.codes, cache.page_table, cache.full, 16, 2)
    wanted = torch.rand(3, 2, cache.page_table.shape[1], device=device) < 0.4
    expected = reference.code_logits(*inputs).unflatten(2, (-1, 16))
    expected.masked_fill_(~wanted.repeat_interleave(3, 1)[..., None], float("-inf"))
    scale = expected[expected.isfinite()].std()
    for logits in (code_logits, reference.code_logits):
        got = logits(*inputs, wanted).unflatten(2, (-1, 16))
        torch.testing.assert_close(
            got / scale, expected / scale, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_wrong_rows_say_what_they_wanted():
    cache = coded_cache([40], 1, 8, 16, 2)
    with pytest.raises(ValueError, match="R = 3 rows for pages of 16 tokens at 2 bits"):
        code_logits(
            torch.zeros(1, 1, 8), cache.codes[:, :, :2], cache.page_table, cache.full, 16, 2
        )
