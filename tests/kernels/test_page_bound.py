import pytest
import torch

from kvplug_kernels.page_bound import page_bound, reference
from tests.kernels.paged_cache import paged_cache, random_query

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_bounds_every_key_of_the_page(dtype):
    cache = paged_cache([33 * 4 - 1, 5, 0], H=2, D=24, S=4, dtype=dtype)
    query = random_query(cache, G=3)
    bound = reference.page_bound(query, cache.digest, cache.page_table, cache.pages)
    for b in range(3):
        for p in range(int(cache.pages[b])):
            keys = cache.keys[cache.page_table[b, p]].float().nan_to_num(0.0)
            q = query[b].float().view(2, 3, 24)
            logits = torch.einsum("hgd,shd->hgs", q, keys).amax((1, 2))
            assert (bound[b, :, p] >= logits * (1 - 2**-8) - 1e-5).all()
        assert (bound[b, :, cache.pages[b] :] == float("-inf")).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gathered", [1, 1 << 14, 4 << 20])
def test_reference_equals_the_definition(dtype, gathered, monkeypatch):
    """In blocks of one page, of several, and of all."""
    monkeypatch.setattr(reference, "GATHERED_BYTES", gathered)
    cache = paged_cache([33 * 4, 9, 0], H=2, D=24, S=4, dtype=dtype)
    inputs = (random_query(cache, G=3), cache.digest, cache.page_table, cache.pages)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        reference.page_bound(*inputs),
        reference.page_bound_plain(*inputs),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize(
    "lengths, H, G, D, S",
    [([3], 1, 1, 64, 4), ([33 * 4, 0], 2, 7, 96, 4), ([5, 70], 1, 8, 80, 4), ([40], 1, 1, 32, 1)],
)
def test_kernel_equals_definition(lengths, H, G, D, S, dtype, device, poisoned_outputs):
    """Pages of one token have negative bounds, which padding a group must not raise to 0."""
    cache = paged_cache(lengths, H, D, S, dtype=dtype, device=device)
    inputs = (random_query(cache, G), cache.digest, cache.page_table, cache.pages)
    torch.testing.assert_close(
        page_bound(*inputs), reference.page_bound_plain(*inputs), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("levels", [1, 3, 15])
def test_bound_of_steps_is_that_of_the_greatest_keys(levels, dtype, device, poisoned_outputs):
    cache = paged_cache([33 * 4, 9, 0], H=2, D=24, S=4, dtype=dtype, device=device)
    lo, hi = cache.digest.float().unbind(2)
    steps = torch.stack([lo, (hi - lo) / levels], 2).to(dtype)
    inputs = (random_query(cache, G=3), steps, cache.page_table, cache.pages, levels)
    expected = reference.page_bound_plain(*inputs)
    tolerance = TOLERANCE[dtype]
    for bound in (page_bound, reference.page_bound):
        torch.testing.assert_close(bound(*inputs), expected, rtol=tolerance, atol=tolerance)


def test_wrong_shape_says_what_it_wanted():
    digest, table = torch.zeros(5, 2, 2, 16), torch.zeros(1, 3, dtype=torch.int32)
    pages = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"digest must be \[N=5, K=1, H=2, 2, D=24\], got"):
        page_bound(torch.zeros(1, 2, 24), digest, table, pages)
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        page_bound(torch.zeros(1, 2, 16), digest, table, pages, levels=0)
    with pytest.raises(ValueError, match="a multiple of the 2 KV heads, got 3"):
        page_bound(torch.zeros(1, 3, 16), digest, table, pages)
