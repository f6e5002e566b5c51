"""The choice without top_p: a heap of the best pages of each head, compiled by Numba."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from kvplug_kernels.cpu_memory import Parallel


@numba.njit(inline="always")
def worse(scores, a, b):
    """Whether page a goes before page b does: by score, then the higher index."""
    return scores[a] < scores[b] or (scores[a] == scores[b] and a > b)


@numba.njit(inline="always")
def sift_down(heap, size, scores, at):
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and worse(scores, heap[child + 1], heap[child]):
            child += 1
        if not worse(scores, heap[child], heap[at]):
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child


@Parallel
def select(scores, pages, keep, width, minimum, chosen, counts):
    B, H, _ = scores.shape
    for item in numba.prange(B * H):
        b, h = item // H, item % H
        count = min(max(min(keep[b], width), minimum), pages[b])
        counts[b, h] = count
        chosen[b, h, count:] = 0
        if count == 0:
            continue
        row, last = scores[b, h], pages[b] - 1
        heap = np.arange(count - 1)
        for at in range((count - 1) // 2, -1, -1):
            sift_down(heap, count - 1, row, at)
        for page in range(count - 1, last):
            if count > 1 and worse(row, heap[0], page):
                heap[0] = page
                sift_down(heap, count - 1, row, 0)
        heap.sort()
        chosen[b, h, : count - 1] = heap
        chosen[b, h, count - 1] = last


def page_select(
    scores: Tensor, pages: Tensor, keep: Tensor, width: int, minimum: int
) -> tuple[Tensor, Tensor]:
    B, H, _ = scores.shape
    chosen = torch.empty(B, H, width, dtype=torch.int32)
    counts = torch.empty(B, H, dtype=torch.int32)
    select(
        8 * scores.numel(), scores.contiguous().numpy(), pages.numpy(), keep.numpy(), width,
        minimum, chosen.numpy(), counts.numpy(),
    )  # fmt: skip
    return chosen, counts
