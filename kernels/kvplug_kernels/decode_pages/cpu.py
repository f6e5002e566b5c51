"""Pages of codes spread out where they are wanted, compiled by Numba."""

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
    INT64,
    UINT8,
    Parallel,
    place,
    span,
    widen,
)
from kvplug_kernels.page_layout import PageLayout, Views


@numba.njit(fastmath=FAST_MATH, nogil=True)
def spread_keys(rows, out, low, H, D, S, J, bits):
    """A page's head; out: address of its first token's key, low: of room for [2, D]."""
    wide = span(low, 0, 2 * D, FP32)
    for d in range(2 * D):
        wide[d] = widen(rows[d])
    lo, step = wide[:D], wide[D:]
    first, mask = rows.ctypes.data + 2 * D * rows.itemsize, np.int32((1 << bits) - 1)
    for s in range(S):
        at = s // J
        byte, shift = span(first, (s - at * J) * D, D, UINT8), np.int32(at * bits)
        key = span(out, s * H * D, D, FP32)
        for d in range(D):
            key[d] = lo[d] + step[d] * np.float32((np.int32(byte[d]) >> shift) & mask)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def spread_values(codes, scales, element, out, H, D, S, V, group, groups, bits):
    """A page's head; codes, scales, out: addresses of its first token's."""
    mask = np.int32((1 << bits) - 1)
    for s in range(S):
        byte, value = span(codes, s * V, V, UINT8), span(out, s * H * D, D, FP32)
        near = span(scales, s * 2 * groups, 2 * groups, element)
        for n in range(groups):
            lo, step = widen(near[n]), widen(near[groups + n])
            d = n * group
            while d < (n + 1) * group:  # as far as the codes stand at one place of their bytes
                at = d // V
                stop, shift = min((at + 1) * V, (n + 1) * group), np.int32(at * bits)
                for c in range(d, stop):
                    code = np.float32((np.int32(byte[c - at * V]) >> shift) & mask)
                    value[c] = lo + step * code
                d = stop


@numba.njit(nogil=True)
def spread_head(
    item, codes, element, values, scales, pages, keys_out, values_out, low, H, D, S, J, key_bits,
    W, V, group, groups, value_bits,
):  # fmt: skip
    page, h = span(pages, item // H, 1, INT64)[0], item % H
    begin = 4 * (item // H * S * H + h) * D
    if page < 0:
        for s in range(S):
            span(keys_out + begin, s * H * D, D, FP32)[:] = FP32
            span(values_out + begin, s * H * D, D, FP32)[:] = FP32
        return
    rows = span(codes[0], page * codes[1] + h * codes[2], W, element)
    spread_keys(rows, keys_out + begin, low, H, D, S, J, key_bits)
    own = values[0] + page * values[1] + h * values[2]
    near = span(scales[0], page * scales[1] + h * scales[2], 0, element).ctypes.data
    spread_values(own, near, element, values_out + begin, H, D, S, V, group, groups, value_bits)


@Parallel
def spread(
    codes, element, values, scales, pages, keys_out, values_out, scratch, count, H, D, S, J,
    key_bits, W, V, group, groups, value_bits, threads,
):  # fmt: skip
    for thread in numba.prange(threads):
        for item in range(thread, count * H, threads):
            spread_head(
                item, codes, element, values, scales, pages, keys_out, values_out,
                scratch + 8 * thread * D, H, D, S, J, key_bits, W, V, group, groups, value_bits,
            )  # fmt: skip


def decode_pages(views: Views, pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    H, S, D = views.keys.shape[1], layout.page_size, layout.head_size
    keys, values = (torch.empty(len(pages), S, H, D, dtype=torch.float32) for _ in range(2))
    scratch, pages = torch.empty(2 * torch.get_num_threads() * D), pages.long()
    spread(
        2 * keys.numel(), place(views.keys), ELEMENT[layout.dtype], place(views.values),
        place(views.scales), pages.data_ptr(), keys.data_ptr(), values.data_ptr(),
        scratch.data_ptr(), len(pages), H, D, S, code_bytes(S, layout.key_bits), layout.key_bits,
        layout.key_rows * D, layout.value_row, layout.group, layout.groups, layout.value_bits,
    )  # fmt: skip
    return keys.to(layout.dtype), values.to(layout.dtype)
