"""The logits in one pass over the codes where they lie, compiled by Numba.

    sum_d q_d * (lo_d + step_d * code_d)  =  q . lo  +  sum_d (q_d * step_d) * code_d

A page's steps go into the group's queries once for all its tokens. A code stays at its place in
the byte: what is above 1 there is taken from the sum, which is exact. Four heads by two places
keep a core's registers full. While it works on one page, a thread fetches its next.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes
from kvplug_kernels.code_logits.cpu_sums import FOUR, eight_logits, eight_logits_of_two, weigh
from kvplug_kernels.cpu_memory import (
    ELEMENT,
    FAST_MATH,
    FP32,
    INT32,
    UINT8,
    Parallel,
    place,
    prefetch,
    span,
    widen,
)
from kvplug_kernels.shapes import by_page

TILE = 16  # pages that a thread takes


@numba.njit(inline="always")
def codes_of(codes, element, table, b, p, h, W, K):
    """The rows of a logical page's head; blocks have K pages."""
    block = np.int64(span(table[0], b * table[1] + p // K, 1, INT32)[0])
    return span(codes[0], block * codes[1] + p % K * codes[2] + h * codes[3], W, element)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def weigh_page(rows, query, scratch, heads, D):
    """query, scratch: addresses of the group's [heads, D], and of room for as many weights, then
    heads and 2 D more."""
    weights, base, low = scratch, scratch + 4 * heads * D, scratch + 4 * heads * (D + 1)
    wide = span(low, 0, 2 * D, FP32)
    for d in range(2 * D):
        wide[d] = widen(rows[d])
    for g in range(0, heads, FOUR):
        weigh(weights + 4 * g * D, base + 4 * g, query + 4 * g * D, low, D)


@numba.njit(inline="always")
def rows_of_four(out, g, G, T):
    """Addresses of the rows of T logits of four heads; the group's last head fills them up."""
    return (
        out + 4 * g * T,
        out + 4 * min(g + 1, G - 1) * T,
        out + 4 * min(g + 2, G - 1) * T,
        out + 4 * min(g + 3, G - 1) * T,
    )


@numba.njit(inline="always")
def keep(rows, t, u, found):
    """Eight logits, of two tokens, in the rows of four heads."""
    first, second, third, fourth = rows
    a, b, c, d, e, f, x, y = found
    span(first, t, 1, FP32)[0] = a
    span(second, t, 1, FP32)[0] = b
    span(third, t, 1, FP32)[0] = c
    span(fourth, t, 1, FP32)[0] = d
    span(first, u, 1, FP32)[0] = e
    span(second, u, 1, FP32)[0] = f
    span(third, u, 1, FP32)[0] = x
    span(fourth, u, 1, FP32)[0] = y


@numba.njit(fastmath=FAST_MATH, nogil=True)
def logits_of_page(rows, query, scratch, out, start, T, heads, G, D, J, bits):
    """out: address of the group's first row of logits; start: the page's first token."""
    weigh_page(rows, query, scratch, heads, D)
    spread = rows.ctypes.data + 2 * D * rows.itemsize
    mask, whole, one = (1 << bits) - 1, np.int32(255), np.float32(1)
    for g in range(0, heads, FOUR):
        own, bases = scratch + 4 * g * D, scratch + 4 * (heads * D + g)
        four = rows_of_four(out + 4 * start, g, G, T)
        for j in range(0, J if bits == 8 else 0, 2):  # a byte is one code: two bytes at once
            other = min(j + 1, J - 1)
            first, second = spread + j * D, spread + other * D
            found = eight_logits_of_two(own, bases, first, second, D, whole, whole, one, one)
            keep(four, j, other, found)
        for pair in range(4 // bits):
            at = 2 * bits * pair
            lower, upper = np.int32(mask << at), np.int32(mask << at + bits)
            below, above = np.float32(1 / (1 << at)), np.float32(1 / (1 << at + bits))
            for j in range(J):
                found = eight_logits(own, bases, spread + j * D, D, lower, upper, below, above)
                t = 2 * pair * J + j
                keep(four, t, t + J, found)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def logits_of_tile(
    tile, codes, element, table, pages, wanted, queries, scratch, out,
    B, H, G, heads, D, P, K, S, J, bits, columns, W,
):  # fmt: skip
    """wanted: an address, or 0 for every page."""
    b, start = tile // columns, tile % columns * TILE
    count = span(pages, b, 1, INT32)[0]
    for h in range(H):
        own = out + 4 * (b * H + h) * G * P * S
        query = queries + 4 * (b * H + h) * heads * D
        scored = span(wanted, (b * H + h) * P, P, UINT8) if wanted else span(pages, 0, 0, UINT8)
        for p in range(start, min(start + TILE, P)):
            if p >= count or (wanted and not scored[p]):
                for g in range(G):
                    span(own, g * P * S + p * S, S, FP32)[:] = -np.inf
                continue
            if p + 1 < count and (not wanted or scored[p + 1]):
                prefetch(codes_of(codes, element, table, b, p + 1, h, W, K))
            rows = codes_of(codes, element, table, b, p, h, W, K)
            logits_of_page(rows, query, scratch, own, p * S, P * S, heads, G, D, J, bits)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def widen_all(query, element, queries, B, H, G, heads, D):
    """The group's last head fills up its last four."""
    wide = span(queries, 0, B * H * heads * D, FP32).reshape((B * H, heads, D))
    for n in range(B * H):
        for g in range(heads):
            begin = n // H * query[1] + (n % H * G + min(g, G - 1)) * query[2]
            head = span(query[0], begin, D, element)
            for d in range(D):
                wide[n, g, d] = widen(head[d])


@Parallel
def logits(
    query, asked, codes, element, table, pages, wanted, queries, out, B, H, G, D, P, K, S, J, bits,
    W, threads,
):  # fmt: skip
    heads = (G + FOUR - 1) // FOUR * FOUR
    widen_all(query, asked, queries, B, H, G, heads, D)
    columns = (P + TILE - 1) // TILE
    for thread in numba.prange(threads):
        scratch = queries + 4 * (B * H * heads * D + thread * (heads + 2) * (D + 16))
        for tile in range(thread, B * columns, threads):
            logits_of_tile(
                tile, codes, element, table, pages, wanted, queries, scratch, out,
                B, H, G, heads, D, P, K, S, J, bits, columns, W,
            )  # fmt: skip


def code_logits(
    query: Tensor,
    codes: Tensor,
    page_table: Tensor,
    pages: Tensor,
    page_size: int,
    bits: int,
    wanted: Tensor | None,
) -> Tensor:
    (B, Hq, D), codes = query.shape, by_page(codes)
    K, H = codes.shape[1:3]
    P = page_table.shape[1] * K
    out = torch.empty(B, Hq, P * page_size, dtype=torch.float32)
    heads = -(-Hq // H // FOUR) * FOUR
    room = B * H * heads * D + torch.get_num_threads() * (heads + 2) * (D + 16)
    queries = torch.empty(room, dtype=torch.float32)
    logits(
        B * P * page_size * Hq * D, place(query), ELEMENT[query.dtype], place(codes),
        ELEMENT[codes.dtype], place(page_table), pages.data_ptr(),
        0 if wanted is None else wanted.data_ptr(), queries.data_ptr(), out.data_ptr(),
        B, H, Hq // H, D, P, K, page_size, code_bytes(page_size, bits), bits, codes.shape[3] * D,
    )  # fmt: skip
    return out
