"""The table in one pass, compiled by Numba: many small torch operations cost more than work."""

from __future__ import annotations

import numba
from torch import Tensor


@numba.njit(nogil=True)
def fill(page_table, chosen, counts, lengths, size, page_stride, head_stride, table, out):
    B, H, K = chosen.shape
    for b in range(B):
        tail = lengths[b] - (lengths[b] - 1) // size * size
        for h in range(H):
            row, count = b * H + h, counts[b, h]
            for k in range(K):
                table[row, k] = 0
                if k < count:
                    table[row, k] = page_table[b, chosen[b, h, k]] * page_stride + h * head_stride
            out[row] = (count - 1) * size + tail if count > 0 else 0


def virtual_heads(
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    page_size: int,
    page_stride: int,
    head_stride: int,
    out: tuple[Tensor, Tensor],
) -> None:
    fill(
        page_table.numpy(), chosen.numpy(), counts.numpy(), lengths.numpy(),
        page_size, page_stride, head_stride, out[0].numpy(), out[1].numpy(),
    )  # fmt: skip
