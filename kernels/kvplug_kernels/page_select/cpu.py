"""The choice without top_p, compiled by Numba: bisect for the lowest score taken, then compact.

Scores are compared as int32 images that keep their order, as the kernel does.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.cpu_memory import FAST_MATH, FP32, INT32, Parallel, place, span

MINUS_ZERO = np.int32(-(1 << 31))  # as bits: fast mathematics does not tell the zeros apart


@numba.njit(inline="always")
def images_of(scores):
    """NaN is -inf, and -0 no less than 0."""
    images = np.empty(len(scores), np.int32)
    for p in range(len(scores)):
        score = scores[p] if scores[p] == scores[p] else np.float32(-np.inf)
        bits = np.float32(score).view(np.int32)
        bits = np.int32(0) if bits == MINUS_ZERO else bits
        images[p] = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return images


@numba.njit(inline="always")
def count_from(images, threshold):
    count = np.int32(0)
    for p in range(len(images)):
        count += np.int32(images[p] >= threshold)
    return count


@numba.njit(inline="always")
def compact(images, needed, first, chosen):
    """Write the indices of the `needed` highest images, ascending from first on."""
    low, high = np.int64(images.min()), np.int64(images.max()) + 1
    reaching = len(images)  # from low on; from high on there are too few
    while low + 1 < high and reaching != needed:
        middle = (low + high) // 2
        count = count_from(images, np.int32(middle))
        if count >= needed:
            low, reaching = middle, count
        else:
            high = middle
    equals = needed - count_from(images, low + 1)  # how many at `low` are taken
    written = 0
    for p in range(len(images)):
        if images[p] > low or (images[p] == low and equals > 0):
            equals -= images[p] == low
            chosen[written] = first + p
            written += 1


@numba.njit(fastmath=FAST_MATH, nogil=True)
def choose(b, h, scores, pages, keep, newest, chosen, count_of, width, minimum, sinks):
    """One head's pages. chosen, count_of: addresses of its own; newest 0 is one page each."""
    available = span(pages, b, 1, INT32)[0]
    count = min(max(min(span(keep, b, 1, INT32)[0], width), minimum), available)
    span(count_of, 0, 1, INT32)[0] = count
    ends = min(max(span(newest, b, 1, INT32)[0], 1) if newest else 1, count)
    begins = min(sinks, available - ends, count - ends)
    needed = count - begins - ends
    taken = span(chosen, 0, width, INT32)
    for p in range(begins):
        taken[p] = p
    if needed > 0:
        first = b * scores[1] + h * scores[2] + begins
        row = span(scores[0], first, available - begins - ends, FP32)
        compact(images_of(row), needed, begins, taken[begins:])
    for p in range(ends):
        taken[count - ends + p] = available - ends + p
    taken[max(count, 0) :] = 0


@Parallel
def select(
    scores, pages, keep, newest, chosen, counts, B, H, width, minimum, sinks, threads
):  # fmt: skip
    for item in numba.prange(B * H):
        own, count_of = chosen + 4 * item * width, counts + 4 * item
        choose(
            item // H, item % H, scores, pages, keep, newest, own, count_of, width, minimum, sinks
        )  # fmt: skip


def page_select(
    scores: Tensor,
    pages: Tensor,
    keep: Tensor,
    width: int,
    minimum: int,
    sinks: int = 0,
    newest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, H, P = scores.shape
    chosen = torch.empty(B, H, width, dtype=torch.int32)
    counts = torch.empty(B, H, dtype=torch.int32)
    select(
        8 * B * H * P, place(scores), pages.data_ptr(), keep.data_ptr(),
        0 if newest is None else newest.data_ptr(), chosen.data_ptr(), counts.data_ptr(),
        B, H, width, minimum, sinks,
    )  # fmt: skip
    return chosen, counts
