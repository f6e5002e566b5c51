"""Full pages written as codes: keys per channel of the page, values per token (KIVI)."""

from torch import Tensor, int32, int64

from kvplug_kernels.dispatch import wants_kernel
from kvplug_kernels.encode_pages import reference
from kvplug_kernels.page_layout import Coded, PageLayout
from kvplug_kernels.shapes import Shapes


def encode_pages(
    cache: Coded,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    layout: PageLayout,
    sources: Tensor | None = None,
) -> None:
    """keys, values [n, S, H, D] of layout.dtype into cache [N, H, page_bytes] uint8 at pages [n].

    A negative page is skipped and its keys and values are not read. With sources [n] those of page
    i are keys[sources[i]] and values[sources[i]], of pools [M, S, H, D]. Both may lie by any
    strides. lo is the lowest of what is coded together, step the least positive number of dtype
    that takes lo + (2**bits - 1) * step to the highest, or its greatest, and each number has the
    nearest code. pages and sources are int32 or int64. Raises ValueError on shapes and layout.
    """
    views, shapes = layout.views(cache), Shapes(keys.device)
    shapes.lengths |= {"S": layout.page_size, "D": layout.head_size}
    shapes.check("keys", keys, "M S H D", (layout.dtype,), strided=True)
    shapes.check("values", values, "M S H D", (layout.dtype,), strided=True)
    shapes.check("the cache's keys", views.keys, "N H R D", (layout.dtype,))
    if sources is not None:
        shapes.check("sources", sources, "n", (int32, int64))
    shapes.check("pages", pages, "M" if sources is None else "n", (int32, int64))
    if wants_kernel(keys):
        from kvplug_kernels.encode_pages import kernel

        return kernel.encode_pages(views, keys, values, pages, layout, sources)
    return reference.encode_pages(views, keys, values, pages, layout, sources)


__all__ = ["encode_pages"]
