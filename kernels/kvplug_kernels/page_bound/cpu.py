"""The bound in one pass over the digests where they lie, compiled by Numba.

The reference must gather the digests first, which costs as much memory traffic again.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.cpu_memory import Parallel, flat, widen


@numba.njit(inline="always")
def best_dot(weights, row, G, W):
    """The largest dot product of a row with the group's weights, four heads at a time."""
    best = np.float32(-np.inf)
    g = 0
    while g + 4 <= G:
        one, two, three, four = weights[g], weights[g + 1], weights[g + 2], weights[g + 3]
        a = b = c = e = np.float32(0)
        for d in range(W):
            value = row[d]
            a += one[d] * value
            b += two[d] * value
            c += three[d] * value
            e += four[d] * value
        best = max(best, a, b, c, e)
        g += 4
    while g < G:
        weight = weights[g]
        a = np.float32(0)
        for d in range(W):
            a += weight[d] * row[d]
        best = max(best, a)
        g += 1
    return best


@Parallel
def bound_fp32(weights, digest, offset, page_stride, head_stride, table, pages, out):
    B, H, G, W = weights.shape
    P = table.shape[1]
    for item in numba.prange(B * P):
        b, p = item // P, item % P
        if p >= pages[b]:
            out[b, :, p] = -np.inf
            continue
        page = offset + np.int64(table[b, p]) * page_stride
        for h in range(H):
            row = digest[page + h * head_stride : page + h * head_stride + W]
            out[b, h, p] = best_dot(weights[b, h], row, G, W)


@Parallel
def bound_bf16(weights, digest, offset, page_stride, head_stride, table, pages, out):
    B, H, G, W = weights.shape
    P = table.shape[1]
    for item in numba.prange(B * P):
        b, p = item // P, item % P
        if p >= pages[b]:
            out[b, :, p] = -np.inf
            continue
        page = offset + np.int64(table[b, p]) * page_stride
        wide = np.empty(W, np.float32)
        for h in range(H):
            row = digest[page + h * head_stride : page + h * head_stride + W]
            for d in range(W):
                wide[d] = widen(row[d])
            out[b, h, p] = best_dot(weights[b, h], wide, G, W)


def page_bound(query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor) -> Tensor:
    B, Hq, D = query.shape
    H = digest.shape[1]
    signed = query.float().view(B, H, Hq // H, D)
    weights = torch.cat([signed.clamp(max=0), signed.clamp(min=0)], -1)  # [B, H, G, 2D]
    out = torch.empty(B, H, page_table.shape[1], dtype=torch.float32)
    bound = bound_fp32 if digest.dtype is torch.float32 else bound_bf16
    bound(
        page_table.numel() * weights[0].numel(),
        weights.numpy(),
        flat(digest),
        digest.storage_offset(),
        digest.stride(0),
        digest.stride(1),
        page_table.numpy(),
        pages.numpy(),
        out.numpy(),
    )
    return out
