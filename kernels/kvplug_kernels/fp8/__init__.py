"""Numbers of eight bits, as caches hold them: torch moves them and computes nothing in them.

Sign, exponent and mantissa are those of fp32 with fewer bits, so that a shift and a power of two
make one of the other, subnormals too; NaN and infinity become numbers beyond the largest.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433
"""

import torch
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BITS = {torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.int8}
"""Integers that hold them where neither Triton nor Numba has such numbers: which says of what."""


def widened(tensor: Tensor) -> Tensor:
    """As bfloat16, which holds each of them, what is of eight bits; all else as it is."""
    return tensor.bfloat16() if tensor.dtype in FP8 else tensor


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, what is of eight bits; all else as it is."""
    return tensor.view(BITS.get(tensor.dtype, tensor.dtype))


__all__ = ["BITS", "FP8", "bits", "widened"]
