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
    rows = keys.unflatten(1, (K, S))[block, page].float()  # [E, S, H, D]
    lo, hi = rows.amin(1), rows.amax(1)
    step = steps(hi - lo, 2**bits - 1, codes.dtype)
    code = ((rows - lo[:, None]) / step.float()[:, None] + 0.5).floor().clamp(0, 2**bits - 1)
    shares = code.to(torch.uint8).unflatten(1, (8 // bits, -1))  # [E, 8 / bits, J, H, D]
    codes[block, page, :, 0] = lo.to(codes.dtype)
    codes[block, page, :, 1] = step
    places = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    joined = (shares << places[:, None, None, None]).sum(1, dtype=torch.uint8)  # [E, J, H, D]
    packed(codes, S, bits)[block, page] = joined.transpose(1, 2)


def steps(span: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """The smallest normal numbers of dtype that cover span [...] fp32 in so many steps; its
    greatest where none does."""
    limits = torch.finfo(dtype)
    near = (span / levels).clamp(limits.tiny, limits.max).to(dtype)
    above = (near.view(INTEGERS[dtype.itemsize]) + 1).view(dtype)
    short = (near.float() * levels < span) & (near.float() < limits.max)
    return torch.where(short, above, near)
