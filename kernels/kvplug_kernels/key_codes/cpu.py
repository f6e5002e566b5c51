"""Codes of the pages that end, from keys however they lie, compiled by Numba."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes
from kvplug_kernels.cpu_memory import (
    ELEMENT,
    FAST_MATH,
    FP32,
    INT32,
    INT64,
    UINT8,
    Parallel,
    place,
    span,
    widen,
)
from kvplug_kernels.shapes import by_page

NUMBER = {
    torch.float32: np.int32(0),
    torch.bfloat16: np.int16(0),
    torch.float16: np.int16(0),
    torch.float8_e4m3fn: np.int8(0),
    torch.float8_e5m2: np.int8(0),
}
"""What holds the bits of an element."""
SHORTER = {
    torch.float32: (0, 0),
    torch.bfloat16: (0, 16),
    torch.float16: (112 << 23, 13),
    torch.float8_e4m3fn: (120 << 23, 20),
    torch.float8_e5m2: (112 << 23, 21),
}
"""What to take from the bits of a positive fp32 number, and by how much to shift the rest right,
for those of the next number of a dtype towards 0."""


@numba.njit(fastmath=FAST_MATH, nogil=True)
def read_page(keys, element, begin, key, lo, hi, low, S, D):
    """key [S, D], lo and hi [D] in fp32, low [D] as the cache has it; all by addresses."""
    for d in range(D):
        least, most = np.float32(np.inf), np.float32(-np.inf)
        for s in range(S):
            raw = span(keys[0], begin + s * keys[2] + d * keys[4], 1, element)[0]
            value = widen(raw)
            span(key, s * D + d, 1, FP32)[0] = value
            most = max(most, value)
            if value < least:
                least = value
                span(low, d, 1, element)[0] = raw
        span(lo, d, 1, FP32)[0], span(hi, d, 1, FP32)[0] = least, most


@numba.njit(fastmath=FAST_MATH, nogil=True)
def write_steps(steps, number, element, lo, hi, D, levels, tiny, most, bias, shift):
    """The least normal numbers that take lo to hi in so many levels, or the greatest; then hi [D]
    holds them."""
    for d in range(D):
        step, high = span(steps, d, 1, number), span(hi, d, 1, FP32)
        reach = high[0] - span(lo, d, 1, FP32)[0]
        near = min(max(np.float32(reach / levels), tiny), most)
        step[0] = (np.int32(np.float32(near).view(np.int32)) - bias) >> shift
        found = widen(span(steps, d, 1, element)[0])
        if found * levels < reach and found < most:
            step[0] += 1
        high[0] = widen(span(steps, d, 1, element)[0])


@numba.njit(fastmath=FAST_MATH, nogil=True)
def write_codes(spread, key, lo, step, joined, D, J, bits, levels):
    least, each, codes = span(lo, 0, D, FP32), span(step, 0, D, FP32), span(joined, 0, D, INT32)
    for j in range(J):
        codes[:] = 0
        for n in range(8 // bits):
            row, at = span(key, (j + n * J) * D, D, FP32), np.int32(n * bits)
            for d in range(D):
                code = np.floor((row[d] - least[d]) / each[d] + np.float32(0.5))
                codes[d] |= np.int32(min(max(code, FP32), levels)) << at
        byte = span(spread, j * D, D, UINT8)
        for d in range(D):
            byte[d] = codes[d]


@numba.njit(nogil=True)
def code_ended(
    item, codes, number, keys, element, slots, scratch, K, H, S, D, J, bits, tiny, most, bias,
    shift,
):  # fmt: skip
    """One head of a slot's page, if the slot is its last."""
    slot, h = span(slots, item // H, 1, INT64)[0], item % H
    if slot < 0 or slot % S != S - 1:
        return
    page, levels = slot // S, np.float32((1 << bits) - 1)
    block, part = page // K, page % K
    low = span(codes[0], block * codes[1] + part * codes[2] + h * codes[3], 3 * D, element)
    first = block * keys[1] + part * S * keys[2] + h * keys[3]
    key, lo = scratch, scratch + 4 * S * D
    hi, joined = lo + 4 * D, lo + 8 * D
    read_page(keys, element, first, key, lo, hi, low.ctypes.data, S, D)
    steps, spread = low[D:].ctypes.data, low[2 * D :].ctypes.data
    write_steps(steps, number, element, lo, hi, D, levels, tiny, most, bias, shift)
    write_codes(spread, key, lo, hi, joined, D, J, bits, levels)


@Parallel
def update(
    codes, number, keys, element, slots, scratch, tokens, K, H, S, D, J, bits, tiny, most, bias,
    shift, threads,
):  # fmt: skip
    for thread in numba.prange(threads):
        for item in range(thread, tokens * H, threads):
            code_ended(
                item, codes, number, keys, element, slots, scratch + 4 * thread * (S + 3) * D,
                K, H, S, D, J, bits, tiny, most, bias, shift,
            )  # fmt: skip


def update_key_codes(codes: Tensor, keys: Tensor, slots: Tensor, bits: int) -> None:
    codes = by_page(codes)
    (_, T, H, D), K, dtype = keys.shape, codes.shape[1], codes.dtype
    S = T // K
    scratch = torch.empty(torch.get_num_threads() * (S + 3) * D, dtype=torch.float32)
    limits = torch.finfo(dtype)
    update(
        len(slots) * H * D, place(codes), NUMBER[dtype], place(keys), ELEMENT[dtype],
        slots.data_ptr(), scratch.data_ptr(), len(slots), K, H, S, D, code_bytes(S, bits), bits,
        np.float32(limits.tiny), np.float32(limits.max), *SHORTER[dtype],
    )  # fmt: skip
