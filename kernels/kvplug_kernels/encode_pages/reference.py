"""Plain fp32 torch."""

from torch import Tensor

from kvplug_kernels.key_codes.reference import coded, joined, write
from kvplug_kernels.page_layout import PageLayout, Views


def encode_pages(
    views: Views,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    layout: PageLayout,
    sources: Tensor | None = None,
) -> None:
    coming = (pages >= 0).nonzero()[:, 0]
    if not len(coming):
        return
    at, of = pages[coming].long(), coming if sources is None else sources[coming].long()
    write(views.keys, (at,), keys[of], layout.key_bits)
    grouped = values[of].unflatten(3, (layout.groups, layout.group)).transpose(1, 2)
    lo, step, code = coded(grouped, 4, layout.value_bits, layout.dtype)  # [E, H, S, groups, ...]
    views.values[at] = joined(code.flatten(3), 3, layout.value_bits)
    views.scales[at, :, :, 0], views.scales[at, :, :, 1] = lo[..., 0], step[..., 0]
