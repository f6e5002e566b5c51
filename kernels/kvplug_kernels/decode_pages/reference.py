"""Plain fp32 torch."""

from torch import Tensor

from kvplug_kernels.code_layout import packed
from kvplug_kernels.key_codes.reference import spread
from kvplug_kernels.page_layout import PageLayout, Views


def decode_pages(views: Views, pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    read = pages.clamp(min=0).long()
    found = keys_of(views, read, layout), values_of(views, read, layout)
    unread = (pages < 0)[:, None, None, None]
    keys, values = (x.masked_fill(unread, 0).transpose(1, 2).to(layout.dtype) for x in found)
    return keys.contiguous(), values.contiguous()


def keys_of(views: Views, pages: Tensor, layout: PageLayout) -> Tensor:
    """fp32 [n, H, S, D]"""
    rows = packed(views.keys, layout.page_size, layout.key_bits)[pages]  # [n, H, J, D]
    lo, step = views.keys[pages, :, :2].float().unbind(2)
    return lo[:, :, None] + step[:, :, None] * spread(rows, 2, layout.key_bits)


def values_of(views: Views, pages: Tensor, layout: PageLayout) -> Tensor:
    """fp32 [n, H, S, D]"""
    lo, step = views.scales[pages].float().unbind(3)  # [n, H, S, groups]
    codes = spread(views.values[pages], 3, layout.value_bits).unflatten(3, (layout.groups, -1))
    return (lo[..., None] + step[..., None] * codes).flatten(3)
