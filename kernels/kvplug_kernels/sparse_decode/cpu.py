"""Attention over what was chosen where it lies, compiled by Numba.

A token's key may lie across its page, a channel's keys side by side, so that all of the page's
lines are read for it: a thread fetches the next token's while it works on one.
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
    INT64,
    Parallel,
    place,
    prefetch,
    prefetch_line,
    span,
    widen,
)
from kvplug_kernels.cpu_powers import power_of_two

FOUR = 4  # query heads at once
AHEAD = 2  # tokens that are being fetched
PARTS_PER_THREAD = 4  # so that threads end at about the same time
LOG2_E = np.float32(1.4426950408889634)


@numba.njit(nogil=True)
def locate(places, pool, table, chosen, start, count, h, size, unit):
    """places [count]: numbers of the first elements of chosen tokens' keys or values, from the
    start-th on. places, table, chosen: addresses, of one row and head."""
    place, page, token = span(places, 0, count, INT64), np.int64(-1), np.int64(0)
    begin = pool[0] * 0
    for t in range(count):
        if unit == 1:
            token = np.int64(span(chosen, start + t, 1, INT32)[0])
        else:
            within = start + t
            token = span(chosen, within // unit, 1, INT32)[0] * unit + within % unit
        if token // size != page:  # neighbours share a page
            page = token // size
            begin = np.int64(span(table, page, 1, INT32)[0]) * pool[1] + h * pool[3]
        place[t] = begin + (token - page * size) * pool[2]


@numba.njit(nogil=True, fastmath=FAST_MATH)
def widen_row(wide, pool, element, begin, following):
    """wide [D] = a key or value that is in the caches, while the following one is fetched."""
    D = len(wide)
    if pool[4] == 1:
        prefetch(span(pool[0], following, D, element))
        row = span(pool[0], begin, D, element)
        for d in range(D):
            wide[d] = widen(row[d])
    else:
        ahead = span(pool[0], following, 1, element).ctypes.data
        stride = span(pool[0], pool[4], 1, element).ctypes.data - pool[0]
        for d in range(D):
            wide[d] = widen(span(pool[0], begin + d * pool[4], 1, element)[0])
            prefetch_line(ahead + d * stride)


@numba.njit(nogil=True, fastmath=FAST_MATH)
def four_dots(one, two, three, four, row):
    a = b = c = e = np.float32(0)
    for d in range(len(row)):
        a += one[d] * row[d]
        b += two[d] * row[d]
        c += three[d] * row[d]
        e += four[d] * row[d]
    return a, b, c, e


@numba.njit(fastmath=FAST_MATH, nogil=True)
def score_keys(keys, element, places, count, query, heads, logits, T, wide, D):
    """logits [heads, T] of keys at so many places; all that are not numbers are addresses."""
    row, q = span(wide, 0, D, FP32), span(query, 0, heads * D, FP32).reshape((heads, D))
    place = span(places, 0, count, INT64)
    for t in range(count):
        widen_row(row, keys, element, place[t], place[min(t + AHEAD, count - 1)])
        for g in range(0, heads, FOUR):
            a, b, c, e = four_dots(q[g], q[g + 1], q[g + 2], q[g + 3], row)
            span(logits, g * T + t, 1, FP32)[0] = a
            span(logits, (g + 1) * T + t, 1, FP32)[0] = b
            span(logits, (g + 2) * T + t, 1, FP32)[0] = c
            span(logits, (g + 3) * T + t, 1, FP32)[0] = e


@numba.njit(fastmath=FAST_MATH, nogil=True)
def bound_all(logits, count, cap):
    """logits [count] in units of a cap -> cap * tanh."""
    row = span(logits, 0, count, FP32)
    for t in range(count):
        small = power_of_two(np.float32(-2) * LOG2_E * abs(row[t]))  # tanh is (1 - e) / (1 + e)
        size = cap * (np.float32(1) - small) / (np.float32(1) + small)
        row[t] = size if row[t] > 0 else -size


@numba.njit(fastmath=FAST_MATH, nogil=True)
def raise_all(logits, count):
    """logits [count] -> 2 to the power of each less the largest; returns that and their sum."""
    row = span(logits, 0, count, FP32)
    top, total = np.float32(-np.inf), np.float32(0)
    for t in range(count):
        top = max(top, row[t])
    for t in range(count):
        row[t] = power_of_two(row[t] - top)
        total += row[t]
    return top, total


@numba.njit(fastmath=FAST_MATH, nogil=True)
def mix_values(values, element, places, count, powers, T, heads, mixed, wide, D):
    """mixed [heads, D] += powers [heads, T] @ values at so many places, all addresses."""
    row, place = span(wide, 0, D, FP32), span(places, 0, count, INT64)
    for t in range(count):
        widen_row(row, values, element, place[t], place[min(t + AHEAD, count - 1)])
        for g in range(heads):
            power, head = span(powers, g * T + t, 1, FP32)[0], span(mixed, g * D, D, FP32)
            for d in range(D):
                head[d] += power * row[d]


@numba.njit(fastmath=FAST_MATH, nogil=True)
def scale_queries(query, asked, queries, b, h, G, heads, D, scale):
    """queries [heads, D] of a group; its last head fills up its last four."""
    q = span(queries, 0, heads * D, FP32).reshape((heads, D))
    for g in range(heads):
        begin = b * query[1] + (h * G + min(g, G - 1)) * query[2]
        head = span(query[0], begin, D, asked)
        for d in range(D):
            q[g, d] = widen(head[d]) * scale


@numba.njit(fastmath=FAST_MATH, nogil=True)
def attend_part(
    b, h, part, parts, query, asked, keys, values, element, table, chosen, counts, lengths,
    scratch, out, G, heads, D, size, unit, scale, cap,
):  # fmt: skip
    """Of one part of a head's selection: mixed values, largest logit and sum of each query head,
    [heads, D + 2] at out."""
    taken = span(counts[0], b * counts[1] + h, 1, INT32)[0]
    tokens = (taken - 1) * unit + (span(lengths, b, 1, INT32)[0] - 1) % unit + 1
    tokens = tokens if taken > 0 else 0
    share = (tokens + parts - 1) // parts
    start = min(part * share, tokens)
    count = min(share, tokens - start)
    queries, wide, logits = scratch, scratch + 4 * heads * D, scratch + 4 * (heads + 1) * D
    tops = span(out, heads * D, heads, FP32)
    totals = span(out, heads * D + heads, heads, FP32)
    tops[:] = -np.inf
    totals[:] = FP32
    if count == 0:
        return
    scale_queries(query, asked, queries, b, h, G, heads, D, scale)
    row = table[0] + 4 * b * table[1]
    picked = chosen[0] + 4 * (b * chosen[1] + h * chosen[2])
    places = logits + 4 * heads * count
    locate(places, keys, row, picked, start, count, h, size, unit)
    score_keys(keys, element, places, count, queries, heads, logits, count, wide, D)
    for g in range(G):
        if cap > 0:
            bound_all(logits + 4 * g * count, count, cap)
        tops[g], totals[g] = raise_all(logits + 4 * g * count, count)
    locate(places, values, row, picked, start, count, h, size, unit)
    span(out, 0, G * D, FP32)[:] = FP32
    mix_values(values, element, places, count, logits, count, G, out, wide, D)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def merge(partial, out, sinks, sequences, parts, G, heads, Hq, D):
    """partial [sequences, parts, heads, D and more] -> out [sequences * G, D]; sinks: an address,
    or 0"""
    each = heads * (D + 2)
    for n in range(sequences):
        for g in range(G):
            mixed = span(out, (n * G + g) * D, D, FP32)
            mixed[:] = FP32
            top, total = np.float32(-np.inf), np.float32(0)
            for part in range(parts):
                top = max(
                    top, span(partial, (n * parts + part) * each + heads * D + g, 1, FP32)[0]
                )
            if sinks:
                sink = span(sinks, (n * G + g) % Hq, 1, FP32)[0] * LOG2_E
                top = max(top, sink)
                total = power_of_two(sink - top)
            for part in range(parts):
                begin = (n * parts + part) * each
                sums = span(partial, begin + heads * D + heads + g, 1, FP32)[0]
                if sums > 0:
                    near = span(partial, begin + heads * D + g, 1, FP32)[0] - top
                    weight, values = power_of_two(near), span(partial, begin + g * D, D, FP32)
                    total += weight * sums
                    for d in range(D):
                        mixed[d] += weight * values[d]
            share = np.float32(1) / total if total > 0 else FP32
            for d in range(D):
                mixed[d] *= share


@Parallel
def attend(
    query, asked, keys, values, element, table, chosen, counts, lengths, scratch, partial, room,
    B, H, parts, G, heads, D, size, unit, scale, cap, threads,
):  # fmt: skip
    for thread in numba.prange(threads):
        for item in range(thread, B * H * parts, threads):
            sequence = item // parts
            attend_part(
                sequence // H, sequence % H, item % parts, parts, query, asked, keys, values,
                element, table, chosen, counts, lengths, scratch + 4 * thread * room,
                partial + 4 * item * heads * (D + 2), G, heads, D, size, unit, scale,
                cap,
            )  # fmt: skip


def sparse_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    scale: float,
    unit: int,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    (B, Hq, D), (S, H) = query.shape, keys.shape[1:3]
    heads, tokens, threads = (
        -(-Hq // H // FOUR) * FOUR,
        chosen.shape[2] * unit,
        torch.get_num_threads(),
    )
    parts = 1 if threads == 1 else -(-PARTS_PER_THREAD * threads // max(B * H, 1))
    out = torch.empty(B, Hq, D, dtype=torch.float32)
    partial = torch.empty(B * H * parts * heads * (D + 2), dtype=torch.float32)
    room = (heads + 1) * D + (heads + 2) * -(-tokens // parts)
    scratch = torch.empty(threads * room, dtype=torch.float32)
    attend(
        2 * B * Hq * tokens * D, place(query), ELEMENT[query.dtype], place(keys), place(values),
        ELEMENT[keys.dtype], place(page_table), place(chosen), place(counts), lengths.data_ptr(),
        scratch.data_ptr(), partial.data_ptr(), room, B, H, parts, Hq // H, heads, D, S, unit,
        np.float32(scale / cap) if cap else np.float32(scale) * LOG2_E, np.float32(cap) * LOG2_E,
    )  # fmt: skip
    beside = sinks if sinks is None else sinks.float()
    merge(
        partial.data_ptr(), out.data_ptr(), 0 if beside is None else beside.data_ptr(), B * H,
        parts, Hq // H, heads, Hq, D,
    )  # fmt: skip
    return out.to(query.dtype)
