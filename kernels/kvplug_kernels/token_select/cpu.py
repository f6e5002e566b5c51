"""The choice compiled by Numba: softmax of each head, bisect for the lowest weight taken, compact.

A weight is no negative number, so its bits are an int32 in the order of the weights.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.cpu_memory import FAST_MATH, FP32, INT32, Parallel, place, span
from kvplug_kernels.cpu_powers import power_of_two

LOWEST = np.int32(-0x7F800000 - 1)  # the image of -inf
LOG2_E = np.float32(1.4426950408889634)
LARGEST, TINY = (np.float32(getattr(torch.finfo(torch.float32), n)) for n in ("max", "tiny"))
INFINITY = np.int32(0x7F800000)  # its bits: no weight reaches them
BLOCK = 32  # tokens that are passed over together where none is taken


@numba.njit(inline="always")
def scaled(logit, scale):
    """In powers of two; what is not above the lowest number, a NaN too, is that number."""
    x = logit * scale
    return x if x > -LARGEST else -LARGEST


@numba.njit(fastmath=FAST_MATH, nogil=True)
def highest(row, n, scale):
    """The largest scaled logit. By images of int32, as LLVM takes no largest of floats that may
    be NaN eight at a time; a NaN's bits are beyond those of infinity of its sign."""
    bits, top = span(row, 0, n, INT32), LOWEST
    for t in range(n):
        image = bits[t] ^ ((bits[t] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        top = max(top, LOWEST if image > INFINITY else image)
    top = np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return min(scaled(top.view(np.float32), scale), LARGEST)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def raise_powers(powers, row, n, scale, top):
    """Of a row's scaled logits less top; returns their sum."""
    logits, power = span(row, 0, n, FP32), span(powers, 0, n, FP32)
    total = np.float32(0)
    for t in range(n):
        value = power_of_two(scaled(logits[t], scale) - top)
        power[t] = value
        total += value
    return total


@numba.njit(fastmath=FAST_MATH, nogil=True)
def add_shares(weights, powers, n, share):
    """weights [n] += powers [n] * share; all addresses."""
    weight, power = span(weights, 0, n, FP32), span(powers, 0, n, FP32)
    for t in range(n):
        weight[t] += power[t] * share


@numba.njit(fastmath=FAST_MATH, nogil=True)
def mean_weights(weights, powers, rows, stride, G, n, scale):
    """weights [n] = mean softmax of G rows of scaled logits; one of -inf alone adds nothing."""
    span(weights, 0, n, FP32)[:] = FP32
    for g in range(G):
        row = rows + 4 * g * stride
        top = highest(row, n, scale)
        if top > -LARGEST:
            total = raise_powers(powers, row, n, scale, top)
            add_shares(weights, powers, n, np.float32(1) / (total * np.float32(G)))


@numba.njit(fastmath=FAST_MATH, nogil=True)
def count_from(images, n, threshold):
    """In fp32, which is exact to 2**24: Numba adds integers in 64 bits, half as many at once."""
    image = span(images, 0, n, INT32)
    count = np.float32(0)
    for t in range(n):
        count += np.float32(1) if image[t] >= threshold else FP32
    return np.int64(count)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def weigh_from(images, n, threshold):
    """The sum of the weights that reach a threshold, given as bits."""
    image, weight = span(images, 0, n, INT32), span(images, 0, n, FP32)
    total = np.float32(0)
    for t in range(n):
        total += weight[t] if image[t] >= threshold else FP32
    return total


@numba.njit(fastmath=FAST_MATH, nogil=True)
def bisect(images, n, least, most, goal):
    """-> low, high, and how many of the weights between them are taken beside those from high on:
    all, unless they are equals, when low + 1 is high. Taken are the fewest, of least to most,
    that weigh goal; weights are compared as bits."""
    low, high = np.int64(0), np.int64(INFINITY)  # from low on there are enough, from high on not
    reaching, beyond, heavier = np.int64(n), np.int64(0), np.float32(0)
    if most <= 0 or (least <= 0 and goal <= 0):
        return high, high, np.int64(0)
    while low + 1 < high and reaching > beyond + 1 and not (reaching == most and goal == np.inf):
        middle = (low + high) // 2
        count = count_from(images, n, np.int32(middle))
        weight = np.float32(0)
        if count >= most:
            enough = True
        elif goal < np.inf:
            weight = weigh_from(images, n, np.int32(middle))
            enough = count >= least and weight >= goal
        else:
            enough = False
        if enough:
            low, reaching = middle, count
        else:
            high, beyond, heavier = middle, count, weight
    taken = reaching - beyond
    if low + 1 == high:  # equals
        taken = min(taken, most - beyond)
        if goal < np.inf:
            each = max(np.int32(low).view(np.float32), TINY)
            missing = np.int64(min(np.ceil((goal - heavier) / each), np.float32(n)))
            taken = min(taken, max(missing, least - beyond))
    return low, high, taken


@numba.njit(nogil=True)
def end_of(images, n, low, high, taken):
    """Behind the last token taken of those whose weights are between."""
    image = span(images, 0, n, INT32)
    for t in range(n):
        if low <= image[t] < high:
            taken -= 1
            if taken < 0:
                return t
    return n


@numba.njit(nogil=True)
def compact(images, start, stop, threshold, begin, chosen):
    """Write the tokens from start to stop that reach a threshold; returns how many. begin: of
    image 0. What does not reach it is overwritten: branches would be foretold wrongly."""
    threshold, found = np.int32(threshold), 0
    for block in range(start, stop, BLOCK):
        size, most = min(BLOCK, stop - block), INT32
        image = span(images, block, size, INT32)
        for t in range(size):
            most = max(most, image[t])
        if most >= threshold:
            for t in range(size):
                span(chosen, found, 1, INT32)[0] = begin + block + t
                found += image[t] >= threshold
    return found


@numba.njit(fastmath=FAST_MATH, nogil=True)
def choose(
    b, h, logits, lengths, keep, scratch, chosen, count_of, G, size, width, scale, top_p, sinks
):
    """One head's tokens. scratch, chosen, count_of: addresses of its own; top_p 2 is none."""
    length = span(lengths, b, 1, INT32)[0]
    scored = max(length - 1, 0) // size * size
    sunk = min(sinks, scored)
    unseen = length - scored + sunk  # taken whatever they weigh
    least = min(length, size + sinks) - unseen
    most = max(min(span(keep, b, 1, INT32)[0], width, length) - unseen, least)
    rows = logits[0] + 4 * (b * logits[1] + h * G * logits[2])
    mean_weights(scratch, scratch + 4 * scored, rows, logits[2], G, scored, scale)
    goal = np.float32(np.inf)
    if top_p <= 1:
        share = weigh_from(scratch, sunk, np.int32(0))
        goal = top_p * weigh_from(scratch, scored, np.int32(0)) - share
    images, n = scratch + 4 * sunk, scored - sunk
    low, high, taken = bisect(images, n, least, most, goal)
    for t in range(sunk):
        span(chosen, t, 1, INT32)[0] = t
    end = end_of(images, n, low, high, taken) if low + 1 == high else n
    count = sunk + compact(images, 0, end, low, sunk, chosen + 4 * sunk)
    count += compact(images, end, n, high, sunk, chosen + 4 * count)
    out = span(chosen, 0, width, INT32)
    for t in range(scored, length):
        out[count] = t
        count += 1
    out[count:] = 0
    span(count_of, 0, 1, INT32)[0] = count


@Parallel
def select(
    logits, lengths, keep, scratch, chosen, counts, B, H, G, T, size, width, scale, top_p, sinks,
    threads,
):  # fmt: skip
    for thread in numba.prange(threads):
        own = scratch + 8 * thread * T
        for item in range(thread, B * H, threads):
            choose(
                item // H, item % H, logits, lengths, keep, own, chosen + 4 * item * width,
                counts + 4 * item, G, size, width, scale, top_p, sinks,
            )  # fmt: skip


def token_select(
    logits: Tensor,
    heads: int,
    lengths: Tensor,
    page_size: int,
    keep: Tensor,
    width: int,
    scale: float,
    top_p: float | None,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    B, Hq, T = logits.shape
    chosen = torch.empty(B, heads, width, dtype=torch.int32)
    counts = torch.empty(B, heads, dtype=torch.int32)
    scratch = torch.empty(torch.get_num_threads() * 2 * T, dtype=torch.float32)
    select(
        8 * B * Hq * T, place(logits), lengths.data_ptr(), keep.data_ptr(), scratch.data_ptr(),
        chosen.data_ptr(), counts.data_ptr(), B, heads, Hq // heads, T, page_size, width,
        np.float32(scale) * LOG2_E, np.float32(2 if top_p is None else top_p), sinks,
    )  # fmt: skip
    return chosen, counts
