"""Plain fp32 torch."""

import torch
from torch import Tensor

from kvplug_kernels.code_layout import packed
from kvplug_kernels.shapes import by_page

INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


def update_key_codes(codes: Tensor, keys: Tensor, slots: Tensor, bits: int) -> None:
    codes = by_page(codes)
    K = codes.shape[1]
    S = keys.shape[1] // K
    pages = slots[(slots >= 0) & (slots % S == S - 1)] // S
    block, page = pages // K, pages % K
    write(codes, (block, page), keys.unflatten(1, (K, S))[block, page], bits)


def write(codes: Tensor, pages: tuple[Tensor, ...], keys: Tensor, bits: int) -> None:
    """keys [E, S, H, D] into codes [..., H, R, D] at pages, an index [E] per axis before H."""
    lo, step, code = coded(keys, 1, bits, codes.dtype)
    codes[..., 0, :][pages], codes[..., 1, :][pages] = lo[:, 0], step[:, 0]
    packed(codes, keys.shape[1], bits)[pages] = joined(code, 1, bits).transpose(1, 2)


def coded(rows: Tensor, axis: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest of rows along an axis, the step in dtype that takes it to the highest, and each
    row's nearest code as uint8."""
    rows, levels = rows.float(), 2**bits - 1
    lo, hi = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
    step = steps(hi - lo, levels, dtype)
    code = ((rows - lo) / step.float() + 0.5).floor().clamp(0, levels)
    return lo.to(dtype), step, code.to(torch.uint8)


def joined(codes: Tensor, axis: int, bits: int) -> Tensor:
    """Those that stand at the 8 / bits places of a byte come from as many parts of the axis."""
    first, *others = codes.unflatten(axis, (8 // bits, -1)).unbind(axis)
    for n, share in enumerate(others, 1):
        first = first | share << n * bits
    return first


def spread(joined: Tensor, axis: int, bits: int) -> Tensor:
    """What ``joined`` made one of, apart again, as uint8."""
    parts = [joined >> place & 2**bits - 1 for place in range(0, 8, bits)]
    return torch.stack(parts, axis).flatten(axis, axis + 1)


def steps(span: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """The smallest normal numbers of dtype that cover span [...] fp32 in so many steps; its
    greatest where none does."""
    limits = torch.finfo(dtype)
    near = (span / levels).clamp(limits.tiny, limits.max).to(dtype)
    above = (near.view(INTEGERS[dtype.itemsize]) + 1).view(dtype)
    short = (near.float() * levels < span) & (near.float() < limits.max)
    return torch.where(short, above, near)
