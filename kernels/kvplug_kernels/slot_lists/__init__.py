"""What each sequence reads as one list of token slots, for a stock kernel that takes lists."""

import torch
from torch import Tensor

from kvplug_kernels.dispatch import wants_kernel
from kvplug_kernels.shapes import INDICES, Shapes, check_page_size, check_unit
from kvplug_kernels.slot_lists import reference


def slot_lists(
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    chosen: Tensor | None = None,
    counts: Tensor | None = None,
    unit: int | None = None,
    token_stride: int | None = None,
) -> tuple[Tensor, Tensor]:
    """page_table [B, P], lengths [B], chosen [B, H, K] and counts [B, H], all int32
    -> bounds [B*H + 1] int32, slots [B*H * K * U] int64.

    Sequence b * H + h reads slots[bounds[n] : bounds[n + 1]]: the tokens of the units that KV head
    h chose in order, each as (page * S + offset) * H + h, the last unit as far as lengths fill it.
    Units are U tokens, pages unless said (1: tokens). Without a choice H is 1 and a sequence reads
    the first lengths tokens of its row's pages; with a token_stride page_table holds the first
    slots of those, and their tokens lie so many apart. What stands behind the last bound is
    undefined. Nothing synchronises. Raises ValueError on shapes, unit, and a stride of a choice.
    """
    shapes = Shapes(page_table.device)
    shapes.check("page_table", page_table, "B P", INDICES)
    shapes.check("lengths", lengths, "B", INDICES)
    check_page_size(page_size)
    unit = check_unit(unit, page_size)
    if (chosen is None) != (counts is None):
        raise ValueError("chosen and counts must be given together, got one of them")
    if chosen is not None and token_stride is not None:
        raise ValueError("token_stride is of pages that are read whole, got a choice beside it")
    width, sequences = shapes["P"], shapes["B"]
    if chosen is not None and counts is not None:
        shapes.check("chosen", chosen, "B H K", INDICES)
        shapes.check("counts", counts, "B H", INDICES)
        width, sequences = shapes["K"], shapes["B"] * shapes["H"]
    bounds = page_table.new_empty(sequences + 1)
    slots = page_table.new_empty(sequences * width * unit, dtype=torch.int64)
    heads = 1 if chosen is None else chosen.shape[1]
    strides = (page_size * heads, heads) if token_stride is None else (1, token_stride)
    arguments = (page_table, lengths, page_size, chosen, counts, bounds, slots, unit, strides)
    if wants_kernel(page_table):
        from kvplug_kernels.slot_lists import kernel

        kernel.slot_lists(*arguments)
    else:
        reference.slot_lists(*arguments)
    return bounds, slots


__all__ = ["slot_lists"]
