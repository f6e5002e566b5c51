"""Digests token by token where they lie, compiled by Numba."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.cpu_memory import Parallel, flat, widen


@Parallel
def update_fp32(digest, offset, strides, keys, start, key_strides, slots, size, H, D):
    for h in numba.prange(H):
        for t in range(len(slots)):
            slot = slots[t]
            if slot < 0:
                continue
            begin = offset + slot // size * strides[0] + h * strides[1]
            low = digest[begin : begin + D]
            high = digest[begin + strides[2] : begin + strides[2] + D]
            row = start + t * key_strides[0] + h * key_strides[1]
            key = keys[row : row + D]
            if slot % size == 0:
                low[:] = key
                high[:] = key
                continue
            for d in range(D):
                low[d] = min(low[d], key[d])
                high[d] = max(high[d], key[d])


@Parallel
def update_bf16(digest, offset, strides, keys, start, key_strides, slots, size, H, D):
    for h in numba.prange(H):
        for t in range(len(slots)):
            slot = slots[t]
            if slot < 0:
                continue
            begin = offset + slot // size * strides[0] + h * strides[1]
            low = digest[begin : begin + D]
            high = digest[begin + strides[2] : begin + strides[2] + D]
            row = start + t * key_strides[0] + h * key_strides[1]
            key = keys[row : row + D]
            if slot % size == 0:
                low[:] = key
                high[:] = key
                continue
            for d in range(D):
                value = widen(key[d])
                low[d] = key[d] if value < widen(low[d]) else low[d]
                high[d] = key[d] if value > widen(high[d]) else high[d]


def update_page_digest(digest: Tensor, keys: Tensor, slots: Tensor, page_size: int) -> None:
    H, D = digest.shape[1], digest.shape[3]
    update = update_fp32 if digest.dtype is torch.float32 else update_bf16
    update(
        slots.numel() * H * D, flat(digest), digest.storage_offset(), np.array(digest.stride()),
        flat(keys), keys.storage_offset(), np.array(keys.stride()),
        slots.numpy(), page_size, H, D,
    )  # fmt: skip
