"""The keys and values of pages of codes, as their codes have them."""

from torch import Tensor, int32, int64

from kvplug_kernels.decode_pages import reference
from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.page_layout import Coded, PageLayout
from kvplug_kernels.shapes import Shapes


def decode_pages(cache: Coded, pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """cache [N, H, page_bytes] uint8, pages [n] int32 or int64 -> keys, values [n, S, H, D].

    lo + step * code in fp32, rounded to layout.dtype; zeros for a negative page. Raises ValueError
    on shapes and layout.
    """
    views = layout.views(cache)
    Shapes(views.keys.device).check("pages", pages, "n", (int32, int64))
    if wants_kernel(views.keys):
        from kvplug_kernels.decode_pages import kernel

        return kernel.decode_pages(views, pages, layout)
    if wants_compiled(views.keys):
        from kvplug_kernels.decode_pages import cpu

        return cpu.decode_pages(views, pages.contiguous(), layout)
    return reference.decode_pages(views, pages, layout)


__all__ = ["decode_pages"]
