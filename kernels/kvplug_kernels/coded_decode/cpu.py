"""Attention over chosen codes where they lie, compiled by Numba.

A page's logits are those of ``code_logits``: its steps go into the group's queries once for all of
its tokens that are read, whether those are all or two. Values are spread out eight channels at a
time, each for four heads. The newest page, which is not coded, is read as ``sparse_decode`` does.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes
from kvplug_kernels.code_logits.cpu import keep, logits_of_page, rows_of_four, weigh_page
from kvplug_kernels.code_logits.cpu_sums import FOUR, LANES, eight_logits_of_two
from kvplug_kernels.coded_decode.cpu_mix import mix_four
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
from kvplug_kernels.page_layout import PageLayout, Views
from kvplug_kernels.sparse_decode.cpu import (
    LOG2_E,
    PARTS_PER_THREAD,
    bound_all,
    merge,
    mix_values,
    raise_all,
    scale_queries,
    score_keys,
)

TOKENS = 64  # whose values are mixed before the next ones'


def compiles(layout: PageLayout) -> bool:
    """Where a vector's channels are of one group and one place in their bytes."""
    return all(n % LANES == 0 for n in (layout.head_size, layout.value_row, layout.group))


@numba.njit(inline="always")
def named(chosen, u, unit):
    """First token of the u-th unit of a row and head at an address, or of all where it is 0."""
    return np.int64(span(chosen, u, 1, INT32)[0] if chosen else u) * unit


@numba.njit(nogil=True)
def find_page(
    codes, element, values, scales, table, chosen, u, stop, newest, h, found, D, S, J, bits, unit,
    W, V, groups,
):  # fmt: skip
    """The chosen tokens of the page in which the u-th unit stands, if that is coded, at found:
    the page's number, then token, row of bytes and shift of each. Their lines are on their way.
    Returns how many they are, and the first unit behind them."""
    if u >= stop:
        return 0, u
    page = named(chosen, u, unit) // S
    if page >= newest:
        return 0, u
    number, base, n = np.int64(span(table, page, 1, INT32)[0]), page * S, 0
    rows, scale = number * codes[1] + h * codes[2], number * scales[1] + h * scales[2]
    value = values[0] + number * values[1] + h * values[2]
    span(found, 0, 1, INT64)[0] = number
    prefetch(span(codes[0], rows, W if unit == S else 2 * D, element))
    if unit == S:
        prefetch(span(scales[0], scale, 2 * S * groups, element))
        token = span(found, 1, S, INT64)
        for k in range(S):
            token[k] = k
        return S, u + 1
    first = span(codes[0], rows + 2 * D, 0, element).ctypes.data
    while u < stop:
        token = named(chosen, u, unit) - base
        if token >= S:
            break
        for k in range(token, token + unit):
            at = k // J
            span(found, 1 + n, 1, INT64)[0] = k
            span(found, 1 + S + n, 1, INT64)[0] = first + (k - at * J) * D
            span(found, 1 + 2 * S + n, 1, INT64)[0] = at * bits
            for line in range(0, D, 64):
                prefetch_line(first + (k - at * J) * D + line)
            for line in range(0, V, 64):
                prefetch_line(value + k * V + line)
            prefetch_line(span(scales[0], scale + 2 * k * groups, 0, element).ctypes.data)
            n += 1
        u += 1
    return n, u


@numba.njit(fastmath=FAST_MATH, nogil=True)
def logits_of_some(rows, found, n, query, scratch, out, T, heads, G, D, S, bits):
    """Of n tokens of a page, two at a time; out: address of the first head's and token's."""
    weigh_page(rows, query, scratch, heads, D)
    row, shift = span(found, 1 + S, n, INT64), span(found, 1 + 2 * S, n, INT64)
    mask = (1 << bits) - 1
    for t in range(0, n, 2):
        u = min(t + 1, n - 1)
        lower, upper = np.int32(mask << shift[t]), np.int32(mask << shift[u])
        below, above = np.float32(1 / (1 << shift[t])), np.float32(1 / (1 << shift[u]))
        for g in range(0, heads, FOUR):
            own, bases = scratch + 4 * g * D, scratch + 4 * (heads * D + g)
            eight = eight_logits_of_two(own, bases, row[t], row[u], D, lower, upper, below, above)
            keep(rows_of_four(out, g, G, T), t, u, eight)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def score_codes(
    codes, element, values, scales, table, chosen, start, stop, newest, h, query, scratch, logits,
    T, places, wide, found, G, heads, D, S, J, bits, unit, W, V, groups,
):  # fmt: skip
    """Logits of the chosen units that stand in coded pages, places and wide scales of their
    values; returns how many tokens those are, and the first unit that is not among them."""
    place, t, other = span(places, 0, T, INT64), 0, found + 8 * (1 + 3 * S)
    n, u = find_page(
        codes, element, values, scales, table, chosen, start, stop, newest, h, found, D, S, J,
        bits, unit, W, V, groups,
    )  # fmt: skip
    while n:
        following, u = find_page(
            codes, element, values, scales, table, chosen, u, stop, newest, h, other, D, S, J,
            bits, unit, W, V, groups,
        )  # fmt: skip
        number = span(found, 0, 1, INT64)[0]
        rows = span(codes[0], number * codes[1] + h * codes[2], W, element)
        if n == S:
            logits_of_page(rows, query, scratch, logits, t, T, heads, G, D, J, bits)
        else:
            own = logits + 4 * t
            logits_of_some(rows, found, n, query, scratch, own, T, heads, G, D, S, bits)
        value, scale = values[0] + number * values[1] + h * values[2], number * scales[1]
        token, first = span(found, 1, n, INT64), scale + h * scales[2]
        for k in range(n):
            place[t + k] = value + token[k] * V
            near = span(scales[0], first + token[k] * 2 * groups, 2 * groups, element)
            own = span(wide, (t + k) * 2 * groups, 2 * groups, FP32)
            for i in range(2 * groups):
                own[i] = widen(near[i])
        t += n
        n, found, other = following, other, found
    return t, u


@numba.njit(fastmath=FAST_MATH, nogil=True)
def mix_codes(places, count, powers, T, wide, mixed, heads, D, V, group, groups, bits):
    """mixed [heads, D] += powers [heads, T] @ the values whose codes are at so many places."""
    place, mask = span(places, 0, count, INT64), np.int32((1 << bits) - 1)
    for start in range(0, count, TOKENS):
        n = min(TOKENS, count - start)
        for t in range(start + n, min(start + n + TOKENS, count)):
            for line in range(0, V, 64):
                prefetch_line(place[t] + line)
        own, near = places + 8 * start, wide + 8 * start * groups
        for g in range(0, heads, FOUR):
            out, power = mixed + 4 * g * D, powers + 4 * (g * T + start)
            for d in range(0, D, 2 * LANES):  # two vectors, of the same bytes if those hold two
                byte = d // 2 % V if bits < 8 else d
                at = d // 2 // V * 2 if bits < 8 else 0
                first = (at * V + byte, byte, at * bits, (at * V + byte) // group)
                if bits < 8:
                    at += 1
                else:
                    byte = min(byte + LANES, D - LANES)
                second = (at * V + byte, byte, at * bits, (at * V + byte) // group)
                mix_four(out, D, power, T, own, n, near, groups, mask, first, second)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def attend_part(
    b, h, part, parts, query, element, codes, values, scales, open_keys, open_values, open_page,
    table, chosen, counts, lengths, scratch, out, G, heads, D, S, unit, scale, cap, J, key_bits,
    W, V, group, groups, value_bits, room,
):  # fmt: skip
    """Of one part of a head's selection: mixed values, largest logit and sum of each query head,
    [heads, D + 2] at out. room: tokens of a part, at most."""
    length = np.int64(span(lengths, b, 1, INT32)[0])
    newest = max(length - 1, 0) // S
    units = (length + unit - 1) // unit
    if chosen[0]:
        units = np.int64(span(counts[0], b * counts[1] + h, 1, INT32)[0])
    share = (units + parts - 1) // parts
    start = min(part * share, units)
    stop = min(start + share, units)
    span(out, 0, heads * D, FP32)[:] = FP32
    tops = span(out, heads * D, heads, FP32)
    totals = span(out, heads * D + heads, heads, FP32)
    tops[:] = -np.inf
    totals[:] = FP32
    if start == stop or length == 0:
        return
    T = (stop - start) * unit
    if stop == units:
        T -= unit - 1 - (length - 1) % unit
    queries, weights = scratch, scratch + 4 * heads * D
    row = weights + 4 * (heads * (D + 1) + 2 * D)
    found, wide = row + 4 * D, row + 4 * D + 16 * (1 + 3 * S)
    places = wide + 8 * room * groups
    logits = places + 16 * room
    scale_queries(query, element, queries, b, h, G, heads, D, scale)
    picked = chosen[0] + 4 * (b * chosen[1] + h * chosen[2]) if chosen[0] else 0
    t, u = score_codes(
        codes, element, values, scales, table[0] + 4 * b * table[1], picked, start, stop, newest,
        h, queries, weights, logits, T, places, wide, found, G, heads, D, S, J, key_bits, unit,
        W, V, groups,
    )  # fmt: skip
    key_place, value_place = span(places, 0, T, INT64), span(places, room, T, INT64)
    number, k = np.int64(span(open_page, b, 1, INT32)[0]), t
    while u < stop:
        for n in range(min(unit, T - k)):
            token = named(picked, u, unit) - newest * S + n
            key_place[k] = number * open_keys[1] + token * open_keys[2] + h * open_keys[3]
            value_place[k] = number * open_values[1] + token * open_values[2] + h * open_values[3]
            k += 1
        u += 1
    raw, last = T - t, logits + 4 * t
    if raw:
        score_keys(open_keys, element, places + 8 * t, raw, queries, heads, last, T, row, D)
    for g in range(G):
        if cap > 0:
            bound_all(logits + 4 * g * T, T, cap)
        tops[g], totals[g] = raise_all(logits + 4 * g * T, T)
    span(logits, G * T, (heads - G) * T, FP32)[:] = FP32
    mix_codes(places, t, logits, T, wide, out, heads, D, V, group, groups, value_bits)
    if raw:
        own = places + 8 * (room + t)
        mix_values(open_values, element, own, raw, last, T, G, out, row, D)


@Parallel
def attend(
    query, element, codes, values, scales, open_keys, open_values, open_page, table, chosen,
    counts, lengths, scratch, partial, each, B, H, parts, G, heads, D, S, unit, scale, cap, J,
    key_bits, W, V, group, groups, value_bits, room, threads,
):  # fmt: skip
    for thread in numba.prange(threads):
        for item in range(thread, B * H * parts, threads):
            sequence = item // parts
            attend_part(
                sequence // H, sequence % H, item % parts, parts, query, element, codes, values,
                scales, open_keys, open_values, open_page, table, chosen, counts, lengths,
                scratch + 4 * thread * each, partial + 4 * item * heads * (D + 2), G, heads, D, S,
                unit, scale, cap, J, key_bits, W, V, group, groups, value_bits, room,
            )  # fmt: skip


def coded_decode(
    query: Tensor,
    views: Views,
    layout: PageLayout,
    open_keys: Tensor,
    open_values: Tensor,
    open_page: Tensor,
    page_table: Tensor,
    chosen: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    scale: float,
    unit: int,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    (Q, Hq, D), S, H = query.shape, layout.page_size, views.keys.shape[1]
    heads, threads = -(-Hq // H // FOUR) * FOUR, torch.get_num_threads()
    parts = 1 if threads == 1 else -(-PARTS_PER_THREAD * threads // max(Q * H, 1))
    units = page_table.shape[1] + 1 if chosen is None else chosen.shape[2]
    room = -(-units // parts) * unit
    out = torch.empty(Q, Hq, D, dtype=torch.float32)
    partial = torch.empty(Q * H * parts * heads * (D + 2), dtype=torch.float32)
    each = heads * (2 * D + 1) + 3 * D + 4 * (1 + 3 * S) + room * (heads + 4 + 2 * layout.groups)
    each += each % 2  # what holds addresses begins at multiples of eight bytes
    scratch = torch.empty(threads * each, dtype=torch.float32)
    attend(
        2 * Q * Hq * units * unit * D, place(query), ELEMENT[query.dtype], place(views.keys),
        place(views.values), place(views.scales), place(open_keys), place(open_values),
        open_page.data_ptr(), place(page_table), (0, 0, 0, 0) if chosen is None else place(chosen),
        (0, 0, 0) if counts is None else place(counts), lengths.data_ptr(), scratch.data_ptr(),
        partial.data_ptr(), each, Q, H, parts, Hq // H, heads, D, S, unit,
        np.float32(scale / cap) if cap else np.float32(scale) * LOG2_E, np.float32(cap) * LOG2_E,
        code_bytes(S, layout.key_bits), layout.key_bits, layout.key_rows * D, layout.value_row,
        layout.group, layout.groups, layout.value_bits, room,
    )  # fmt: skip
    beside = sinks if sinks is None else sinks.float()
    merge(
        partial.data_ptr(), out.data_ptr(), 0 if beside is None else beside.data_ptr(), Q * H,
        parts, Hq // H, heads, Hq, D,
    )  # fmt: skip
    return out.to(query.dtype)
