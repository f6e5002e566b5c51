"""What each KV head chose of pages on the host, brought into hot pages unless it is there."""

import torch
from torch import Tensor

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.resident_pages import reference
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes

EMPTY = -1
"""What ``held`` says of a hot page that holds nothing."""


def resident_pages(
    cache: Tensor,
    held: Tensor,
    host: Tensor,
    rows: Tensor,
    hot: Tensor,
    away: Tensor,
    chosen: Tensor,
    counts: Tensor,
    behind: Tensor,
    first: int = 0,
) -> Tensor:
    """cache [N, H, S, C], held [N, H] int32, host [R, H, S, C] -> columns [B, H, K] int32.

    Request b has its first away [B] pages on the host: page p lies in host row rows[b, p] - first
    of rows [B, P]. Its hot pages hot [B, J] of the cache hold one of them for each KV head, or
    nothing: held[hot[b, j], h] says which, EMPTY none. Of chosen [B, H, K], ascending, the first
    counts [B, H] count. Those below away[b] that no hot page holds are copied, in order, to hot
    pages that hold nothing chosen, the first of them first, and held says so. A column is j for
    page p of the host, p - away[b] + behind[b] for all others, 0 past counts. At most J pages of
    the host may be chosen at once, each once. Requests share no hot page. Raises ValueError on
    shapes.
    """
    shapes = Shapes(cache.device)
    shapes.check("cache", cache, "N H S C", FLOATS)
    shapes.check("held", held, "N H", INDICES, strided=True)
    shapes.check("host", host, "R H S C", (cache.dtype,))
    shapes.check("chosen", chosen, "B H K", INDICES)
    shapes.check("counts", counts, "B H", INDICES)
    shapes.check("rows", rows, "B P", INDICES)
    shapes.check("hot", hot, "B J", INDICES)
    shapes.check("away", away, "B", INDICES)
    shapes.check("behind", behind, "B", INDICES)
    for name, pages in (("cache", cache), ("host", host)):
        if pages.stride(2) != pages.shape[3]:
            raise ValueError(
                f"{name} must have each head's page in one piece, got strides "
                f"{list(pages.stride())} of {list(pages.shape)}"
            )
    columns = torch.empty(chosen.shape, dtype=torch.int32, device=chosen.device)
    arguments = cache, held, host, rows, hot, away, chosen, counts, behind, first, columns
    if wants_kernel(cache):
        from kvplug_kernels.resident_pages import kernel

        kernel.resident_pages(*arguments)
    elif wants_compiled(cache):
        from kvplug_kernels.resident_pages import cpu

        cpu.resident_pages(*arguments)
    else:
        reference.resident_pages(*arguments)
    return columns


__all__ = ["EMPTY", "resident_pages"]
