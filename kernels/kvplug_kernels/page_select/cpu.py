"""The choice without top_p, compiled by Numba: bisect for the lowest score taken, then compact.

Scores are compared as int32 images that keep their order, as the kernel does.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.cpu_memory import FP32, INT32, Parallel, place, span


@numba.njit(inline="always")
def images_of(scores):
    """NaN is -inf, and -0 no less than 0."""
    images = np.empty(len(scores), np.int32)
    for p in range(len(scores)):
        score = scores[p] if scores[p] == scores[p] else np.float32(-np.inf)
        bits = np.float32(score + FP32).view(np.int32)
        images[p] = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return images


@numba.njit(inline="always")
def count_from(images, threshold):
    count = np.int32(0)
    for p in range(len(images)):
        count += np.int32(images[p] >= threshold)
    return count


@numba.njit(inline="always")
def compact(images, needed, chosen):
    """Write the indices of the `needed` highest images, ascending."""
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
            chosen[written] = p
            written += 1


@Parallel
def select(scores, pages, keep, chosen, counts, B, H, width, minimum, threads):
    for item in numba.prange(B * H):
        b, h = item // H, item % H
        available = span(pages, b, 1, INT32)[0]
        count = min(max(min(span(keep, b, 1, INT32)[0], width), minimum), available)
        span(counts, item, 1, INT32)[0] = count
        taken = span(chosen, item * width, width, INT32)
        taken[max(count, 0) :] = 0
        if count > 1:
            begin = b * scores[1] + h * scores[2]
            row = span(scores[0], begin, available - 1, FP32)
            compact(images_of(row), count - 1, taken)
        if count > 0:
            taken[count - 1] = available - 1


def page_select(
    scores: Tensor, pages: Tensor, keep: Tensor, width: int, minimum: int
) -> tuple[Tensor, Tensor]:
    B, H, P = scores.shape
    chosen = torch.empty(B, H, width, dtype=torch.int32)
    counts = torch.empty(B, H, dtype=torch.int32)
    select(
        8 * B * H * P, place(scores), pages.data_ptr(), keep.data_ptr(),
        chosen.data_ptr(), counts.data_ptr(), B, H, width, minimum,
    )  # fmt: skip
    return chosen, counts
