"""Sums over tokens in vectors, written by hand as those of ``code_logits.cpu_sums``."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvplug_kernels.code_logits.cpu_sums import (
    FAST,
    FOUR,
    LANES,
    fill,
    shuffled,
    store,
    vector_at,
)


@intrinsic
def mix_four(
    typing_context: Any, mixed: Any, D: Any, powers: Any, T: Any, places: Any, count: Any,
    scales: Any, groups: Any, mask: Any, first: Any, second: Any,
) -> Any:  # fmt: skip
    """mixed [4, D] += powers [4, T] @ (lo + step * code) of two vectors of eight channels.

    places: addresses of count rows of bytes; scales [count, 2, groups] fp32: lo, then step; first
    and second: (channel, byte of the row, shift, group) of each. All else by addresses.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mixed, D, powers, T, places, count, scales, groups, mask, *vectors = arguments
        chosen = [cgutils.unpack_tuple(builder, each) for each in vectors]
        whole, real = (ir.VectorType(kind, LANES) for kind in (ir.IntType(32), ir.FloatType()))
        sums = {}
        for n, (channel, *_) in enumerate(chosen):
            for g in range(FOUR):
                number = builder.add(builder.mul(D, D.type(g)), channel)
                at = builder.add(mixed, builder.mul(number, D.type(4)))
                sums[n, g] = at, cgutils.alloca_once_value(builder, vector_at(builder, at, real))
        masks = every(builder, mask)
        shifts = [every(builder, builder.trunc(each[2], mask.type)) for each in chosen]
        heads = [
            builder.add(powers, builder.mul(builder.mul(T, D.type(g)), D.type(4)))
            for g in range(FOUR)
        ]
        with cgutils.for_range(builder, count) as loop:
            t = loop.index
            row = load(builder, builder.add(places, builder.mul(t, D.type(8))), D.type)
            width = builder.mul(groups, D.type(8))  # bytes of a token's scales
            own = builder.add(scales, builder.mul(t, width))
            numbers = []
            for (_, byte, _, group), shift in zip(chosen, shifts, strict=True):
                kind = ir.VectorType(ir.IntType(8), LANES)
                joined = builder.zext(vector_at(builder, builder.add(row, byte), kind), whole)
                code = builder.and_(builder.lshr(joined, shift), masks)
                low = builder.add(own, builder.mul(group, D.type(4)))
                step = builder.add(low, builder.mul(groups, D.type(4)))
                lo, each = (
                    every(builder, load(builder, at, ir.FloatType())) for at in (low, step)
                )
                more = builder.fmul(builder.sitofp(code, real), each, flags=FAST)
                numbers.append(builder.fadd(lo, more, flags=FAST))
            for g, head in enumerate(heads):
                at = builder.add(head, builder.mul(t, D.type(4)))
                power = every(builder, load(builder, at, ir.FloatType()))
                for n, number in enumerate(numbers):
                    total = sums[n, g][1]
                    more = builder.fmul(number, power, flags=FAST)
                    builder.store(builder.fadd(builder.load(total), more, flags=FAST), total)
        for at, total in sums.values():
            store(builder, at, builder.load(total))
        return context.get_dummy_value()

    number, vector = types.int64, types.UniTuple(types.int64, 4)
    arguments = [number] * 8
    return types.void(*arguments, types.int32, vector, vector), generate


def every(builder: Any, value: Any) -> Any:
    return shuffled(builder, fill(builder, [value]), [0] * LANES)


def load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)
