"""The logits in one pass over the codes where they lie, compiled by Numba.

    sum_d q_d * (lo_d + step_d * code_d)  =  q . lo  +  sum_d (q_d * step_d) * code_d

A page's steps go into the group's queries once for all its tokens. A code stays at its place in
the byte: what is above 1 there is taken from the sum, which is exact. Four heads by two places
keep a core's registers full. While it works on one page, a thread fetches its next.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes
from kvplug_kernels.cpu_memory import (
    ELEMENT,
    FAST_MATH,
    FP32,
    INT32,
    Parallel,
    place,
    prefetch,
    span,
    widen,
)

FOUR = 4  # query heads at once
LANES = 8  # of a vector
FAST = tuple(FAST_MATH)
TILE = 16  # pages that a thread takes


@intrinsic
def weigh(
    typing_context: Any, weights: Any, base: Any, query: Any, low: Any, D: Any
) -> Any:  # fmt: skip
    """weights [4, D] = query [4, D] * step [D], base [4] = query . low; all fp32 by addresses,
    the steps behind the lowest keys."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, base, query, low, D = arguments
        real = ir.VectorType(ir.FloatType(), LANES)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(real, None)) for _ in range(FOUR)]
        row = builder.mul(D, D.type(4))
        with cgutils.for_range(builder, builder.udiv(D, D.type(LANES))) as loop:
            at = builder.mul(loop.index, D.type(4 * LANES))
            lowest = vector_at(builder, builder.add(low, at), real)
            step = vector_at(builder, builder.add(builder.add(low, row), at), real)
            for g, total in enumerate(sums):
                begin = builder.add(builder.mul(row, D.type(g)), at)
                q = vector_at(builder, builder.add(query, begin), real)
                more = builder.fmul(q, lowest, flags=FAST)
                builder.store(builder.fadd(builder.load(total), more, flags=FAST), total)
                store(builder, builder.add(weights, begin), builder.fmul(q, step, flags=FAST))
        found = transposed_sum(builder, [builder.load(total) for total in sums] * 2)
        store(builder, base, shuffled(builder, found, [*range(FOUR)]))
        return context.get_dummy_value()

    number = types.int64
    return types.void(number, number, number, number, number), generate


@intrinsic
def eight_logits(
    typing_context: Any, weights: Any, base: Any, row: Any, D: Any, lower: Any, upper: Any,
    below: Any, above: Any,
) -> Any:  # fmt: skip
    """Of four heads over a row of D bytes, at two places given as masks and what they divide by;
    weights, base and row are addresses. By hand: LLVM keeps no eight sums of a loop in registers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, base, row, D, lower, upper, below, above = arguments
        byte, whole, real = (
            ir.VectorType(kind, LANES) for kind in (ir.IntType(8), ir.IntType(32), ir.FloatType())
        )
        sums = [cgutils.alloca_once_value(builder, ir.Constant(real, None)) for _ in range(8)]
        masks = [shuffled(builder, fill(builder, [mask]), [0] * LANES) for mask in (lower, upper)]
        with cgutils.for_range(builder, builder.udiv(D, D.type(LANES))) as loop:
            at = builder.mul(loop.index, D.type(LANES))
            joined = builder.zext(vector_at(builder, builder.add(row, at), byte), whole)
            codes = [builder.sitofp(builder.and_(joined, mask), real) for mask in masks]
            for g in range(FOUR):
                number = builder.add(builder.mul(D, D.type(g)), at)
                begin = builder.add(weights, builder.mul(number, D.type(4)))
                weight = vector_at(builder, begin, real)
                for total, code in zip(sums[g::FOUR], codes, strict=True):
                    product = builder.fmul(weight, code, flags=FAST)
                    more = builder.fadd(builder.load(total), product, flags=FAST)
                    builder.store(more, total)
        joined = transposed_sum(builder, [builder.load(total) for total in sums])
        shares = shuffled(builder, fill(builder, [below, above]), [0] * FOUR + [1] * FOUR)
        bases = vector_at(builder, base, ir.VectorType(ir.FloatType(), FOUR))
        bases = shuffled(builder, bases, [*range(FOUR)] * 2)
        found = builder.fadd(builder.fmul(joined, shares, flags=FAST), bases, flags=FAST)
        each = [builder.extract_element(found, ir.IntType(32)(n)) for n in range(8)]
        return context.make_tuple(builder, signature.return_type, each)

    number, mask, share = types.int64, types.int32, types.float32
    found = types.UniTuple(types.float32, 2 * FOUR)
    return found(number, number, number, number, mask, mask, share, share), generate


def store(builder: Any, address: Any, vector: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def transposed_sum(builder: Any, rows: list[Any]) -> Any:
    """Eight vectors -> the vector of their sums, in three steps without crossing early."""
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    for step in (low, high), ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]), (
        [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15],
    ):  # fmt: skip
        rows = [
            builder.fadd(*(shuffled(builder, one, order, two) for order in step), flags=FAST)
            for one, two in zip(rows[::2], rows[1::2], strict=True)
        ]
    return rows[0]


def shuffled(builder: Any, vector: Any, order: list[int], other: Any = None) -> Any:
    kind = ir.VectorType(ir.IntType(32), len(order))
    other = ir.Constant(vector.type, ir.Undefined) if other is None else other
    return builder.shuffle_vector(vector, other, ir.Constant(kind, order))


def fill(builder: Any, values: list[Any]) -> Any:
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for n, value in enumerate(values):
        vector = builder.insert_element(vector, value, ir.IntType(32)(n))
    return vector


def vector_at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


@numba.njit(inline="always")
def codes_of(codes, element, table, b, p, h, W):
    """The rows of a logical page's head."""
    page = np.int64(span(table[0], b * table[1] + p, 1, INT32)[0])
    return span(codes[0], page * codes[1] + h * codes[2], W, element)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def logits_of_page(rows, query, scratch, out, start, T, heads, G, D, J, bits):
    """query, scratch, out: addresses of the group's [heads, D], of room for as many weights and
    more, and of its first row of logits; start: the page's first token."""
    weights, base, low = scratch, scratch + 4 * heads * D, scratch + 4 * heads * (D + 1)
    wide = span(low, 0, 2 * D, FP32)
    for d in range(2 * D):
        wide[d] = widen(rows[d])
    spread = rows.ctypes.data + 2 * D * rows.itemsize
    mask = (1 << bits) - 1
    for g in range(0, heads, FOUR):
        own, bases = weights + 4 * g * D, base + 4 * g
        weigh(own, bases, query + 4 * g * D, low, D)
        first = out + 4 * (g * T + start)
        second = out + 4 * (min(g + 1, G - 1) * T + start)
        third = out + 4 * (min(g + 2, G - 1) * T + start)
        fourth = out + 4 * (min(g + 3, G - 1) * T + start)
        for pair in range(4 // bits):
            at = 2 * bits * pair
            lower, upper = np.int32(mask << at), np.int32(mask << at + bits)
            below, above = np.float32(1 / (1 << at)), np.float32(1 / (1 << at + bits))
            for j in range(J):
                a, b, c, d, e, f, x, y = eight_logits(
                    own, bases, spread + j * D, D, lower, upper, below, above
                )
                t, u = 2 * pair * J + j, 2 * pair * J + J + j
                span(first, t, 1, FP32)[0] = a
                span(second, t, 1, FP32)[0] = b
                span(third, t, 1, FP32)[0] = c
                span(fourth, t, 1, FP32)[0] = d
                span(first, u, 1, FP32)[0] = e
                span(second, u, 1, FP32)[0] = f
                span(third, u, 1, FP32)[0] = x
                span(fourth, u, 1, FP32)[0] = y


@numba.njit(fastmath=FAST_MATH, nogil=True)
def logits_of_tile(
    tile, codes, element, table, pages, queries, scratch, out,
    B, H, G, heads, D, P, S, J, bits, columns, W,
):  # fmt: skip
    b, start = tile // columns, tile % columns * TILE
    count = span(pages, b, 1, INT32)[0]
    for h in range(H):
        own = out + 4 * (b * H + h) * G * P * S
        query = queries + 4 * (b * H + h) * heads * D
        for p in range(start, min(start + TILE, P)):
            if p >= count:
                for g in range(G):
                    span(own, g * P * S + p * S, S, FP32)[:] = -np.inf
                continue
            if p + 1 < count:
                prefetch(codes_of(codes, element, table, b, p + 1, h, W))
            rows = codes_of(codes, element, table, b, p, h, W)
            logits_of_page(rows, query, scratch, own, p * S, P * S, heads, G, D, J, bits)


@numba.njit(fastmath=FAST_MATH, nogil=True)
def widen_all(query, element, queries, B, H, G, heads, D):
    """The group's last head fills up its last four."""
    wide = span(queries, 0, B * H * heads * D, FP32).reshape((B * H, heads, D))
    for n in range(B * H):
        for g in range(heads):
            begin = n // H * query[1] + (n % H * G + min(g, G - 1)) * query[2]
            head = span(query[0], begin, D, element)
            for d in range(D):
                wide[n, g, d] = widen(head[d])


@Parallel
def logits(
    query, codes, element, table, pages, queries, out, B, H, G, D, P, S, J, bits, W, threads
):
    heads = (G + FOUR - 1) // FOUR * FOUR
    widen_all(query, element, queries, B, H, G, heads, D)
    columns = (P + TILE - 1) // TILE
    for thread in numba.prange(threads):
        scratch = queries + 4 * (B * H * heads * D + thread * (heads + 2) * (D + 16))
        for tile in range(thread, B * columns, threads):
            logits_of_tile(
                tile, codes, element, table, pages, queries, scratch, out,
                B, H, G, heads, D, P, S, J, bits, columns, W,
            )  # fmt: skip


def code_logits(
    query: Tensor, codes: Tensor, page_table: Tensor, pages: Tensor, page_size: int, bits: int
) -> Tensor:
    B, Hq, D = query.shape
    H, P = codes.shape[1], page_table.shape[1]
    out = torch.empty(B, Hq, P * page_size, dtype=torch.float32)
    heads = -(-Hq // H // FOUR) * FOUR
    room = B * H * heads * D + torch.get_num_threads() * (heads + 2) * (D + 16)
    queries = torch.empty(room, dtype=torch.float32)
    logits(
        B * P * page_size * Hq * D, place(query), place(codes), ELEMENT[codes.dtype],
        place(page_table), pages.data_ptr(), queries.data_ptr(), out.data_ptr(), B, H, Hq // H, D,
        P, page_size, code_bytes(page_size, bits), bits, codes.shape[2] * D,
    )  # fmt: skip
    return out
