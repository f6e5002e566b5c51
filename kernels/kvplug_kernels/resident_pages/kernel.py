"""One program per (request, KV head) gives what was chosen its place; one per page copies it.

The second has as many programs as may be chosen: those whose page is there already end at once, so
that the shapes of a launch follow from a step's size alone. ``host`` may be host memory that the
device reads where it lies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8  # of what was chosen, compared with all hot pages at once
ELEMENTS = 2048  # of a page that a program copies at once


@triton.jit
def seat_kernel(
    held, hot, away, chosen, counts, behind, columns, missing, H, K, J,
    held_n, held_h, hot_b, chosen_b, chosen_h, counts_b,
    TILES: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    b, h = item // H, item % H
    count = tl.minimum(tl.load(counts + b * counts_b + h), K)
    far, shift = tl.load(away + b), tl.load(behind + b)
    j = tl.arange(0, BJ)
    page_of = tl.load(hot + b * hot_b + j, mask=j < J, other=0).to(tl.int64)
    there = tl.load(held + page_of * held_n + h * held_h, mask=j < J, other=-1)
    own = chosen + b * chosen_b + h * chosen_h
    read = tl.zeros([BJ], tl.int32)
    for tile in range(TILES):
        k = tile * BK + tl.arange(0, BK)
        page = tl.load(own + k, mask=k < count, other=0)
        distant = (k < count) & (page < far)
        equal = distant[:, None] & (page[:, None] == there[None, :]) & (j < J)[None, :]
        read = tl.maximum(read, tl.max(equal.to(tl.int32), 0))
    unread = (read == 0) & (j < J)
    order = tl.cumsum(unread.to(tl.int32), 0) - 1  # among those, of each
    before = tl.zeros([], tl.int32)
    for tile in range(TILES):
        k = tile * BK + tl.arange(0, BK)
        page = tl.load(own + k, mask=k < count, other=0)
        distant = (k < count) & (page < far)
        equal = distant[:, None] & (page[:, None] == there[None, :]) & (j < J)[None, :]
        gone = distant & (tl.max(equal.to(tl.int32), 1) == 0)
        rank = before + tl.cumsum(gone.to(tl.int32), 0) - 1
        taken = gone[:, None] & unread[None, :] & (rank[:, None] == order[None, :])
        seat = tl.sum(tl.where(equal | taken, j[None, :], 0), 1)
        column = tl.where(distant, seat, page - far + shift)
        at = item * K + k
        tl.store(columns + at, tl.where(k < count, column, 0), mask=k < K)
        tl.store(missing + at, gone.to(tl.int32), mask=k < K)
        before += tl.sum(gone.to(tl.int32), 0)


@triton.jit
def copy_kernel(
    cache, held, host, rows, hot, chosen, columns, missing, first, H, K,
    cache_n, cache_h, held_n, held_h, host_n, host_h, rows_b, hot_b, chosen_b, chosen_h,
    SIZE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    if tl.load(missing + at) != 0:
        item, k = at // K, at % K
        b, h = item // H, item % H
        page = tl.load(chosen + b * chosen_b + h * chosen_h + k)
        source = tl.load(rows + b * rows_b + page).to(tl.int64) - first
        target = tl.load(hot + b * hot_b + tl.load(columns + at)).to(tl.int64)
        read = host + source * host_n + h * host_h
        write = cache + target * cache_n + h * cache_h
        for begin in range(0, SIZE, BE):
            e = begin + tl.arange(0, BE)
            tl.store(write + e, tl.load(read + e, mask=e < SIZE), mask=e < SIZE)
        tl.store(held + target * held_n + h * held_h, page)


def blocks(size: int) -> dict[str, int]:
    return {"SIZE": size, "BE": min(ELEMENTS, triton.next_power_of_2(size))}


def seats(K: int, J: int) -> dict[str, int]:
    return {"TILES": triton.cdiv(K, TILE), "BK": TILE, "BJ": triton.next_power_of_2(max(J, 2))}


def resident_pages(
    cache: Tensor,
    held: Tensor,
    host: Tensor,
    rows: Tensor,
    hot: Tensor,
    away: Tensor,
    chosen: Tensor,
    counts: Tensor,
    behind: Tensor,
    first: int,
    columns: Tensor,
) -> None:
    B, H, K = chosen.shape
    if not columns.numel():
        return
    missing = torch.empty_like(columns)
    seat_kernel[(B * H,)](
        held, hot, away, chosen, counts, behind, columns, missing, H, K, hot.shape[1],
        *held.stride(), hot.stride(0), *chosen.stride()[:2], counts.stride(0),
        **seats(K, hot.shape[1]),
    )  # fmt: skip
    copy_kernel[(B * H * K,)](
        cache, held, host, rows, hot, chosen, columns, missing, first, H, K,
        *cache.stride()[:2], *held.stride(), *host.stride()[:2], rows.stride(0), hot.stride(0),
        *chosen.stride()[:2], **blocks(cache.shape[2] * cache.shape[3]),
    )  # fmt: skip
