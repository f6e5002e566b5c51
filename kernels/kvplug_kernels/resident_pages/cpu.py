"""The same in one pass, compiled by Numba."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from kvplug_kernels.cpu_memory import INT32, UINT8, Parallel, place, span


@numba.njit(nogil=True)
def bring(
    b, h, cache, held, host, rows, hot, away, chosen, counts, behind, columns,
    first, K, J, P, size, page_bytes,
):  # fmt: skip
    """One head of one request. cache, host: strides in bytes."""
    count, far = span(counts[0], b * counts[1] + h, 1, INT32)[0], span(away, b, 1, INT32)[0]
    pages = span(chosen[0], b * chosen[1] + h * chosen[2], K, INT32)
    hot_pages, lie = span(hot[0], b * hot[1], J, INT32), span(rows[0], b * rows[1], P, INT32)
    column = span(columns, (b * size + h) * K, K, INT32)
    shift = span(behind, b, 1, INT32)[0] - far
    reads = np.zeros(J, np.bool_)
    for k in range(K):
        column[k] = 0
        if k < count:
            column[k] = pages[k] + shift
            if pages[k] < far:
                column[k] = -1
                for j in range(J):
                    if (
                        span(held[0], hot_pages[j] * held[1] + h * held[2], 1, INT32)[0]
                        == pages[k]
                    ):
                        column[k], reads[j] = j, True
    seat = 0
    for k in range(min(count, K)):
        if column[k] < 0:
            while reads[seat]:
                seat += 1
            column[k], target = seat, hot_pages[seat]
            span(held[0], target * held[1] + h * held[2], 1, INT32)[0] = pages[k]
            source = (lie[pages[k]] - first) * host[1] + h * host[2]
            into = span(cache[0], target * cache[1] + h * cache[2], page_bytes, UINT8)
            into[:] = span(host[0], source, page_bytes, UINT8)
            seat += 1


@Parallel
def bring_all(
    cache, held, host, rows, hot, away, chosen, counts, behind, columns,
    first, B, H, K, J, P, page_bytes, threads,
):  # fmt: skip
    for item in numba.prange(B * H):
        bring(
            item // H, item % H, cache, held, host, rows, hot, away, chosen, counts, behind,
            columns, first, K, J, P, H, page_bytes,
        )  # fmt: skip


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
    item = cache.element_size()
    moved, source = (
        (each.data_ptr(), each.stride(0) * item, each.stride(1) * item) for each in (cache, host)
    )
    page_bytes = cache.shape[2] * cache.shape[3] * item
    bring_all(
        B * H * K * page_bytes // 8, moved, place(held), source, place(rows), place(hot),
        away.data_ptr(), place(chosen), place(counts), behind.data_ptr(), columns.data_ptr(),
        first, B, H, K, hot.shape[1], rows.shape[1], page_bytes,
    )  # fmt: skip
