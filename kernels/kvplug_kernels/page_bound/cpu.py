"""The bound in one pass over the digests where they lie, compiled by Numba.

    sum_d max(q_d * lo_d, q_d * hi_d)  =  [min(q, 0) | max(q, 0)] . [lo | hi]
                                       =  [q | levels max(q, 0)] . [lo | step]

Digests lie apart, a few KiB behind each page, so that a core's own prefetching starts anew with
every page and reading them takes longer than computing. While it works on one tile of pages, a
thread therefore fetches its next.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.cpu_memory import (
    ELEMENT,
    FAST_MATH,
    FP32,
    INT32,
    Parallel,
    place,
    prefetch,
    span,
    widen,
)
from kvplug_kernels.shapes import by_page

TILE = 16  # pages: two tiles fit a core's second cache; one head's weights stay in the first
FOUR = 4  # query heads at once


@numba.njit(inline="always")
def sign_queries(weights, query, element, b, h, G, D, levels):
    """Fill weights [groups of FOUR, 2D]; the group's last head fills up its last four. levels: 0
    where pages store their greatest keys."""
    for g in range(len(weights)):
        begin = b * query[1] + (h * G + min(g, G - 1)) * query[2]
        head = span(query[0], begin, D, element)
        for d in range(D):
            value = widen(head[d])
            weights[g, d] = value if levels else min(value, FP32)
            weights[g, D + d] = max(value, FP32) * np.float32(max(levels, 1))


@numba.njit(inline="always")
def best_dot(weights, row):
    """weights [fours, W], row [W] -> the largest dot product; four at once hide their latency."""
    best = np.float32(-np.inf)
    for g in range(0, len(weights), FOUR):
        one, two, three, four = weights[g], weights[g + 1], weights[g + 2], weights[g + 3]
        a = b = c = e = np.float32(0)
        for d in range(len(row)):
            value = widen(row[d])
            a += one[d] * value
            b += two[d] * value
            c += three[d] * value
            e += four[d] * value
        best = max(best, max(max(a, b), max(c, e)))
    return best


@numba.njit(inline="always")
def row_of(digest, element, table, b, p, h, W, K):
    """[lo | hi] of a logical page, of which blocks have K."""
    block = np.int64(span(table[0], b * table[1] + p // K, 1, INT32)[0])
    return span(digest[0], block * digest[1] + p % K * digest[2] + h * digest[3], W, element)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def bound_tile(
    tile, following, digest, element, table, pages, weights, out, B, H, heads, W, P, K, columns
):  # fmt: skip
    """The bounds of one tile of a request's pages, while the tile that follows is fetched."""
    b, start = tile // columns, tile % columns * TILE
    ahead, begin = following // columns, following % columns * TILE
    count = span(pages, b, 1, INT32)[0]
    fetched = span(pages, ahead, 1, INT32)[0] if ahead < B else 0
    for h in range(H):
        weight = span(weights, (b * H + h) * heads * W, heads * W, FP32).reshape((heads, W))
        bounds = span(out, (b * H + h) * P, P, FP32)
        for p in range(start, min(start + TILE, P)):
            after = begin + p - start
            if after < fetched:
                prefetch(row_of(digest, element, table, ahead, after, h, W, K))
            best = np.float32(-np.inf)
            if p < count:
                best = best_dot(weight, row_of(digest, element, table, b, p, h, W, K))
            bounds[p] = best


@numba.njit(fastmath=FAST_MATH, nogil=True)
def sign_all(query, element, weights, B, H, G, heads, D, levels):
    signed = span(weights, 0, B * H * heads * 2 * D, FP32).reshape((B, H, heads, 2 * D))
    for b in range(B):
        for h in range(H):
            sign_queries(signed[b, h], query, element, b, h, G, D, levels)


@Parallel
def bound(
    query, asked, digest, element, table, pages, weights, out, B, H, G, D, P, K, levels, threads
):  # fmt: skip
    heads = (G + FOUR - 1) // FOUR * FOUR
    sign_all(query, asked, weights, B, H, G, heads, D, levels)
    columns = (P + TILE - 1) // TILE
    for thread in numba.prange(threads):
        for tile in range(thread, B * columns, threads):
            bound_tile(
                tile, tile + threads, digest, element, table, pages, weights, out,
                B, H, heads, 2 * D, P, K, columns,
            )  # fmt: skip


def page_bound(
    query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor, levels: int | None
) -> Tensor:
    (B, Hq, D), digest = query.shape, by_page(digest)
    K, H = digest.shape[1:3]
    P = page_table.shape[1] * K
    out = torch.empty(B, H, P, dtype=torch.float32)
    weights = torch.empty(B * (Hq + FOUR * H) * 2 * D, dtype=torch.float32)  # on a cache line
    bound(
        B * P * Hq * 2 * D, place(query), ELEMENT[query.dtype], place(digest),
        ELEMENT[digest.dtype], place(page_table), pages.data_ptr(), weights.data_ptr(),
        out.data_ptr(), B, H, Hq // H, D, P, K, levels or 0,
    )  # fmt: skip
    return out
