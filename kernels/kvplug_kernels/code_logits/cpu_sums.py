"""Sums over channels in vectors, written by hand: LLVM keeps no eight sums of a loop in registers.

Vectors are LLVM's own, for any CPU. A vector of eight bytes is one of each channel's.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvplug_kernels.cpu_memory import FAST_MATH

FOUR = 4  # query heads at once
LANES = 8  # of a vector; channels are a multiple
FAST = tuple(FAST_MATH)


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


NUMBER, MASK, SHARE = types.int64, types.int32, types.float32
EIGHT = types.UniTuple(types.float32, 2 * FOUR)


@intrinsic
def eight_logits(
    typing_context: Any, weights: Any, base: Any, row: Any, D: Any, lower: Any, upper: Any,
    below: Any, above: Any,
) -> Any:  # fmt: skip
    """Of four heads over a row of D bytes, at two places given as masks and what they divide by;
    weights, base and row are addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, base, row, D, *places = arguments
        each = eight_sums(builder, weights, base, [row], D, *places)
        return context.make_tuple(builder, signature.return_type, each)

    return EIGHT(NUMBER, NUMBER, NUMBER, NUMBER, MASK, MASK, SHARE, SHARE), generate


@intrinsic
def eight_logits_of_two(
    typing_context: Any, weights: Any, base: Any, row: Any, other: Any, D: Any, lower: Any,
    upper: Any, below: Any, above: Any,
) -> Any:  # fmt: skip
    """The same of two rows, a place of each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, base, row, other, D, *places = arguments
        each = eight_sums(builder, weights, base, [row, other], D, *places)
        return context.make_tuple(builder, signature.return_type, each)

    return EIGHT(NUMBER, NUMBER, NUMBER, NUMBER, NUMBER, MASK, MASK, SHARE, SHARE), generate


def eight_sums(
    builder: Any, weights: Any, base: Any, rows: list[Any], D: Any, lower: Any, upper: Any,
    below: Any, above: Any,
) -> list[Any]:  # fmt: skip
    """By hand: LLVM keeps no eight sums of a loop in registers."""
    byte, whole, real = (
        ir.VectorType(kind, LANES) for kind in (ir.IntType(8), ir.IntType(32), ir.FloatType())
    )
    sums = [cgutils.alloca_once_value(builder, ir.Constant(real, None)) for _ in range(8)]
    masks = [shuffled(builder, fill(builder, [mask]), [0] * LANES) for mask in (lower, upper)]
    with cgutils.for_range(builder, builder.udiv(D, D.type(LANES))) as loop:
        at = builder.mul(loop.index, D.type(LANES))
        joined = [
            builder.zext(vector_at(builder, builder.add(row, at), byte), whole) for row in rows
        ]
        both = zip(joined * (2 // len(rows)), masks, strict=True)
        codes = [builder.sitofp(builder.and_(bytes, mask), real) for bytes, mask in both]
        for g in range(FOUR):
            number = builder.add(builder.mul(D, D.type(g)), at)
            begin = builder.add(weights, builder.mul(number, D.type(4)))
            weight = vector_at(builder, begin, real)
            for total, code in zip(sums[g::FOUR], codes, strict=True):
                product = builder.fmul(weight, code, flags=FAST)
                more = builder.fadd(builder.load(total), product, flags=FAST)
                builder.store(more, total)
    summed = transposed_sum(builder, [builder.load(total) for total in sums])
    shares = shuffled(builder, fill(builder, [below, above]), [0] * FOUR + [1] * FOUR)
    bases = vector_at(builder, base, ir.VectorType(ir.FloatType(), FOUR))
    bases = shuffled(builder, bases, [*range(FOUR)] * 2)
    found = builder.fadd(builder.fmul(summed, shares, flags=FAST), bases, flags=FAST)
    return [builder.extract_element(found, ir.IntType(32)(n)) for n in range(8)]


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
