"""The bounds in one program, then one program per (sequence, block of its tokens)."""

import triton
import triton.language as tl
from torch import Tensor

SEQUENCES = 1024  # that the bounds are summed over at once
TOKENS = 1024  # of a sequence that a program writes


@triton.jit
def bounds_kernel(counts, lengths, bounds, N, H, counts_b, U: tl.constexpr, CHOOSES: tl.constexpr,
                  BN: tl.constexpr):  # fmt: skip
    total = 0
    tl.store(bounds, 0)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        there = n < N
        tokens = tl.load(lengths + n // H, mask=there, other=0)
        if CHOOSES:
            count = tl.load(counts + n // H * counts_b + n % H, mask=there, other=0)
            # Of an empty sequence the remainder is negative: it has no unit.
            tokens = tl.where(count > 0, (count - 1) * U + (tokens - 1) % U + 1, 0)
        tl.store(bounds + n + 1, total + tl.cumsum(tokens, 0), mask=there)
        total += tl.sum(tokens, 0)


@triton.jit
def slots_kernel(
    page_table, chosen, bounds, slots, H, table_b, chosen_b, chosen_h, page_stride, token_stride,
    S: tl.constexpr, U: tl.constexpr, CHOOSES: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds + sequence).to(tl.int64)
    tokens = tl.load(bounds + sequence + 1) - begin
    if tl.program_id(1) * BT >= tokens:
        return
    b, h = sequence // H, sequence % H
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    read = t < tokens
    token = t
    if CHOOSES:
        unit = tl.load(chosen + b * chosen_b + h * chosen_h + t // U, mask=read, other=0)
        token = unit * U + t % U
    page = tl.load(page_table + b * table_b + token // S, mask=read, other=0).to(tl.int64)
    found = page * page_stride + token % S * token_stride + h
    tl.store(slots + begin + t, found, mask=read)


def slot_lists(
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    chosen: Tensor | None,
    counts: Tensor | None,
    bounds: Tensor,
    slots: Tensor,
    unit: int,
    strides: tuple[int, int],
) -> None:
    N, chooses = len(bounds) - 1, chosen is not None
    if not N:
        bounds.zero_()
        return
    H = 1 if chosen is None else chosen.shape[1]
    choice = (0, 0) if chosen is None else chosen.stride()[:2]
    BN = min(SEQUENCES, triton.next_power_of_2(N))
    most = len(slots) // N
    bounds_kernel[(1,)](
        lengths if counts is None else counts, lengths, bounds, N, H,
        0 if counts is None else counts.stride(0), U=unit, CHOOSES=chooses, BN=BN,
    )  # fmt: skip
    if not most:
        return
    BT = min(TOKENS, triton.next_power_of_2(most))
    slots_kernel[(N, triton.cdiv(most, BT))](
        page_table, page_table if chosen is None else chosen, bounds, slots, H,
        page_table.stride(0), *choice, *strides, S=page_size, U=unit, CHOOSES=chooses, BT=BT,
    )  # fmt: skip
