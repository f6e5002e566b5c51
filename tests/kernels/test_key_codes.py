import pytest
import torch

from kvplug_kernels.code_layout import packed
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.key_codes import code_rows, reference, update_key_codes
from tests.kernels.coded_cache import empty_cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16, *FP8]


def code(codes, n, h, d, token, S, bits):
    """One token's code by the place that code_layout names, from the page's bytes."""
    rows = codes[n, h, 2:].contiguous().view(torch.uint8).flatten().tolist()
    J, D = S * bits // 8, codes.shape[3]
    return rows[token % J * D + d] >> token // J * bits & 2**bits - 1


def written(H, D, S, bits, dtype, device="cpu", across=False, pages=5):
    """Pages of normal keys, one channel constant and one with a single key apart."""
    keys, _, codes = empty_cache(pages, H, D, S, bits, dtype, device, across)
    drawn = torch.randn(pages, S, H, D, generator=torch.Generator().manual_seed(D + bits))
    drawn[:, :, :, 3] = 0.71
    drawn[:, :, :, 4] = -2.0
    drawn[:, 1, :, 4] = min(900.0, torch.finfo(dtype).max / 2)
    keys.copy_(drawn)
    return keys, codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, S", [(1, 16), (2, 16), (2, 32), (4, 6), (8, 5)])
def test_a_code_is_the_nearest_step_from_the_lowest_key_to_beyond_the_highest(bits, S, dtype):
    keys, codes = written(2, 8, S, bits, dtype)
    reference.update_key_codes(codes, keys, torch.arange(5 * S), bits)
    keys = keys.double()
    lo, step = codes[:, :, :2].double().unbind(2)
    bits_of = reference.INTEGERS[dtype.itemsize]
    below = (codes[:, :, 1].contiguous().view(bits_of) - 1).view(dtype)
    high = keys.amax(1)
    assert torch.equal(lo, keys.amin(1))
    assert (step > 0).all()
    rounding = 2**-22 if dtype == torch.float32 else 0.0  # spans are fp32 numbers themselves
    reach = (2**bits - 1) * (1 + rounding)
    varied = (high > lo) & (step > torch.finfo(dtype).tiny)
    assert (lo + reach * step >= high).all()
    assert (lo + (2**bits - 1) * (1 - rounding) * below.double() < high)[varied].all()
    for n, h, d, t in torch.cartesian_prod(*map(torch.arange, (5, 2, 8, S))).tolist():
        error = lo[n, h, d] + step[n, h, d] * code(codes, n, h, d, t, S, bits) - keys[n, t, h, d]
        assert error.abs() <= step[n, h, d] * 0.5001
    assert all(code(codes, n, 1, 3, t, S, bits) == 0 for n in range(5) for t in range(S))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [False, True])
def test_any_order_of_writes_gives_the_same_codes(dtype, across):
    """Token by token, in chunks, all at once, and again over a page that was coded."""
    S, bits = 16, 2
    keys, codes = written(3, 8, S, bits, dtype, across=across)
    reference.update_key_codes(codes, keys, torch.arange(4 * S), bits)
    expected = codes.clone()
    assert expected[:4, :, :2].float().isfinite().all()
    assert expected[4].isnan().all()
    slots = torch.arange(4 * S)
    orders = {
        "one by one": slots.split(1),
        "pages from the last": [slots.view(4, S).flip(0).flatten()],
        "chunks across pages": slots.split(S + 3),
        "with padding, and again": [torch.cat([torch.tensor([-1, -S - 1]), slots, slots])],
    }
    for order in orders.values():
        codes[:4] = 7.0
        for chunk in order:
            reference.update_key_codes(codes, keys, chunk, bits)
        assert torch.equal(codes[:4, :, :2].float(), expected[:4, :, :2].float())
        assert torch.equal(packed(codes, S, bits)[:4], packed(expected, S, bits)[:4])
        assert codes[4].isnan().all()


@pytest.mark.parametrize(
    "H, D, S, bits",
    [(2, 80, 16, 1), (1, 64, 32, 2), (3, 128, 64, 4), (2, 64, 12, 2), (1, 64, 5, 8)],
)
@pytest.mark.parametrize("across", [False, True])
def test_kernel_equals_reference(H, D, S, bits, across, dtype, device):
    """Some pages of a batch end, some do not, and some slots are padding."""
    keys, codes = written(H, D, S, bits, dtype, device, across, pages=6)
    expected = codes.clone()
    slots = [-1, *range(S + 3, 3 * S), 4 * S - 2, -7, 5 * S - 1, 0]
    slots = torch.tensor(slots, dtype=torch.int64, device=device)
    update_key_codes(codes, keys, slots, bits)
    reference.update_key_codes(expected, keys, slots, bits)
    assert expected[4, :, :2].isfinite().all()
    assert torch.equal(codes[:, :, :2].nan_to_num(7.0), expected[:, :, :2].nan_to_num(7.0))
    assert torch.equal(packed(codes, S, bits), packed(expected, S, bits))


@pytest.mark.gpu
def test_kernel_is_captured_in_a_graph():
    keys, codes = written(8, 128, 32, 2, torch.bfloat16, "cuda")
    slots = torch.arange(100, device="cuda")
    update_key_codes(codes, keys, slots, 2)
    expected = codes.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_key_codes(codes, keys, slots, 2)
    codes.zero_()
    graph.replay()
    assert torch.equal(packed(codes, 32, 2)[:3], packed(expected, 32, 2)[:3])


def test_a_page_is_coded_by_its_last_token_alone():
    keys, codes = written(1, 8, 16, 4, torch.float32)
    reference.update_key_codes(codes, keys, torch.arange(16, 31), 4)
    assert codes.isnan().all()
    reference.update_key_codes(codes, keys, torch.tensor([-1, 31]), 4)
    assert codes[1, :, :2].isfinite().all()


@pytest.mark.parametrize("bits, S, itemsize, rows", [(2, 32, 2, 6), (1, 16, 4, 3), (4, 16, 2, 6)])
def test_rows_behind_a_page(bits, S, itemsize, rows):
    assert code_rows(S, bits, itemsize) == rows


def test_wrong_knobs_say_what_they_wanted():
    keys, codes = torch.zeros(2, 16, 1, 8), torch.zeros(2, 1, 3, 8)
    slots = torch.arange(2)
    with pytest.raises(ValueError, match="bits must be 1, 2, 4 or 8, got 3"):
        update_key_codes(codes, keys, slots, 3)
    with pytest.raises(
        ValueError, match="a multiple of 4 tokens, which share a byte at 2 bits, g"
    ):
        update_key_codes(codes, keys[:, :14], slots, 2)
    with pytest.raises(ValueError, match="R = 4 rows for pages of 16 tokens at 4 bits, got"):
        update_key_codes(codes, keys, slots, 4)
    with pytest.raises(ValueError, match="must have rows of D = 8 elements side by side"):
        update_key_codes(torch.zeros(2, 1, 6, 8)[:, :, ::2], keys, slots, 2)
