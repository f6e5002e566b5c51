"""One program per (request, KV head, block of the selection)."""

import triton
import triton.language as tl
from torch import Tensor

CHOSEN = 256  # entries of a selection that a program takes


@triton.jit
def virtual_heads_kernel(
    page_table, chosen, counts, lengths, table, tokens, H, K, page_stride, head_stride,
    token_stride, table_b, chosen_b, chosen_h, counts_b, out_b,
    S: tl.constexpr, U: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    b, h = sequence // H, sequence % H
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    count = tl.load(counts + b * counts_b + h)
    named = k < count
    unit = tl.load(chosen + b * chosen_b + h * chosen_h + k, mask=named & (k < K), other=0)
    token = unit * U
    page = tl.load(page_table + b * table_b + token // S, mask=named, other=0).to(tl.int64)
    virtual = page * page_stride + h * head_stride + token % S * token_stride
    virtual = tl.where(named, virtual, 0)
    tl.store(table + sequence * out_b + k, virtual.to(tl.int32), mask=k < K)
    if tl.program_id(1) == 0:
        length = tl.load(lengths + b)
        filled = (count - 1) * U + (length - 1) % U + 1
        tl.store(tokens + sequence, tl.where(count > 0, filled, 0))


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
    B, H, K = chosen.shape
    if not B * H:
        return
    BK = min(CHOSEN, triton.next_power_of_2(max(K, 1)))
    virtual_heads_kernel[(B * H, max(1, triton.cdiv(K, BK)))](
        page_table, chosen, counts, lengths, *out, H, K, page_stride, head_stride,
        token_stride, page_table.stride(0), *chosen.stride()[:2], counts.stride(0),
        out[0].stride(0), S=page_size, U=unit, BK=BK,
    )  # fmt: skip
