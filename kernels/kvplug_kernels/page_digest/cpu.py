"""Digests token by token where they lie, compiled by Numba."""

from __future__ import annotations

import numba
from torch import Tensor

from kvplug_kernels.cpu_memory import ELEMENT, FAST_MATH, INT64, Parallel, place, span, widen
from kvplug_kernels.shapes import by_page


@numba.njit(fastmath=FAST_MATH, nogil=True)
def update_head(h, digest, keys, element, slots, tokens, size, K, D):
    for t in range(tokens):
        slot = span(slots, 0, tokens, INT64)[t]
        if slot < 0:
            continue
        page = slot // size
        begin = page // K * digest[1] + page % K * digest[2] + h * digest[3]
        low = span(digest[0], begin, D, element)
        high = span(digest[0], begin + digest[4], D, element)
        begin = t * keys[1] + h * keys[2]
        key = span(keys[0], begin, D, element)
        begins = slot % size == 0
        for d in range(D):
            value = widen(key[d])
            low[d] = key[d] if begins or value < widen(low[d]) else low[d]
            high[d] = key[d] if begins or value > widen(high[d]) else high[d]


@Parallel
def update(digest, keys, element, slots, tokens, size, K, H, D, threads):
    for h in numba.prange(H):
        update_head(h, digest, keys, element, slots, tokens, size, K, D)


def update_page_digest(digest: Tensor, keys: Tensor, slots: Tensor, page_size: int) -> None:
    digest = by_page(digest)
    tokens, (K, H, _, D) = slots.shape[0], digest.shape[1:]
    update(
        tokens * H * D, place(digest), place(keys), ELEMENT[digest.dtype], slots.data_ptr(),
        tokens, page_size, K, H, D,
    )  # fmt: skip
