import pytest
import torch

from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.encode_pages import encode_pages
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
