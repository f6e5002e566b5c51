"""The table in one pass, compiled by Numba: many small torch operations cost more than work."""

from __future__ import annotations

import numba
from torch import Tensor

from kvplug_kernels.cpu_memory import INT32, place, span


@numba.njit(nogil=True)
def fill(
    page_table, chosen, counts, lengths, table, tokens,
    B, H, K, P, size, page_stride, head_stride, unit, token_stride,
):  # fmt: skip
    for b in range(B):
        length = span(lengths, b, 1, INT32)[0]
        physical = span(page_table[0], b * page_table[1], P, INT32)
        tail = length - (length - 1) // unit * unit
        for h in range(H):
            count = span(counts[0], b * counts[1] + h, 1, INT32)[0]
            begin, row = b * chosen[1] + h * chosen[2], (b * H + h) * table[1]
            units = span(chosen[0], begin, K, INT32)
            virtual = span(table[0], row, K, INT32)
            for k in range(K):
                virtual[k] = 0
                if k < count:
                    token = units[k] * unit
                    page, offset = physical[token // size], token % size
                    first = page * page_stride + h * head_stride
                    virtual[k] = first + offset * token_stride
            filled = (count - 1) * unit + tail
            span(tokens, b * H + h, 1, INT32)[0] = filled if count > 0 else 0


def virtual_heads(
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    page_size: int,
    page_stride: int,
    head_stride: int,
    out: tuple[Tensor, Tensor],
    unit: int,
    token_stride: int,
) -> None:
    fill(
        place(page_table), place(chosen), place(counts), lengths.data_ptr(), place(out[0]),
        out[1].data_ptr(), *chosen.shape, page_table.shape[1], page_size, page_stride, head_stride,
        unit, token_stride,
    )  # fmt: skip
