"""One program per (slot, KV head); all but those of a page's last token leave at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes, packed
from kvplug_kernels.fp8 import bits as bits_of
from kvplug_kernels.fp8.kernel import narrowed, widened

KEYS = 4096  # elements of keys read at once


@triton.jit
def load_keys(
    keys, start, place, keys_s, keys_d, absent,
    D: tl.constexpr, J: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of the tokens that stand at one place of the bytes from start on. [BJ, BD] fp32"""
    j = start + tl.arange(0, BJ)
    d = tl.arange(0, BD)
    key = keys + (place * J + j)[:, None] * keys_s + d[None, :] * keys_d
    inside = (j < J)[:, None] & (d < D)[None, :]
    loaded = widened(tl.load(key, mask=inside, other=0.0)).to(tl.float32)
    return tl.where(inside, loaded, absent)


@triton.jit
def step_of(
    span, LEVELS: tl.constexpr, TINY: tl.constexpr, MOST: tl.constexpr, element: tl.constexpr
):  # fmt: skip
    """The least normal number that covers span in LEVELS steps, or the greatest."""
    near = tl.minimum(tl.maximum(tl.div_rn(span, 1.0 * LEVELS), TINY), MOST)
    if element == tl.uint8 or element == tl.int8:
        near = narrowed(near, element)  # towards 0
        above = near + 1
    else:
        near = near.to(element)
        number: tl.constexpr = tl.int32 if element == tl.float32 else tl.int16
        above = (near.to(number, bitcast=True) + 1).to(element, bitcast=True)
    found = widened(near).to(tl.float32)
    return tl.where((found * LEVELS < span) & (found < MOST), above, near)


@triton.jit
def code_page(
    row, byte, keys, keys_s, keys_d, TINY: tl.constexpr, MOST: tl.constexpr,
    D: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A page's head: lo, step and bytes from its keys; row, byte, keys: where each begins."""
    lo = tl.full([BD], float("inf"), tl.float32)
    hi = tl.full([BD], float("-inf"), tl.float32)
    for start in range(0, J, BJ):
        for place in tl.static_range(8 // BITS):
            k = load_keys(keys, start, place, keys_s, keys_d, float("inf"), D, J, BJ, BD)
            lo = tl.minimum(lo, tl.min(k, axis=0))
            hi = tl.maximum(hi, tl.max(tl.where(k < float("inf"), k, float("-inf")), axis=0))

    d = tl.arange(0, BD)
    LEVELS: tl.constexpr = (1 << BITS) - 1
    lo, hi = tl.where(d < D, lo, 0.0), tl.where(d < D, hi, 0.0)
    step = step_of(hi - lo, LEVELS, TINY, MOST, row.dtype.element_ty)
    tl.store(row + d, narrowed(lo, row.dtype.element_ty), mask=d < D)
    tl.store(row + D + d, step, mask=d < D)

    step = widened(step).to(tl.float32)
    for start in range(0, J, BJ):
        j = start + tl.arange(0, BJ)
        joined = tl.zeros([BJ, BD], tl.int32)
        for place in tl.static_range(8 // BITS):
            k = load_keys(keys, start, place, keys_s, keys_d, 0.0, D, J, BJ, BD)
            joined |= nearest(k, lo[None, :], step[None, :], LEVELS) << (place * BITS)
        inside = (j < J)[:, None] & (d < D)[None, :]
        tl.store(byte + d[None, :] + j[:, None] * D, joined.to(tl.uint8), mask=inside)


@triton.jit
def nearest(number, lo, step, LEVELS: tl.constexpr):
    """Codes, int32."""
    code = tl.floor(tl.div_rn(number - lo, step + tl.zeros_like(number)) + 0.5)
    return tl.minimum(tl.maximum(code, 0.0), 1.0 * LEVELS).to(tl.int32)


@triton.jit
def update_key_codes_kernel(
    codes, spread, keys, slots, codes_n, codes_k, codes_h, spread_n, spread_k, spread_h,
    keys_n, keys_s, keys_h, keys_d, TINY: tl.constexpr, MOST: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slots + tl.program_id(0).to(tl.int64))
    if (slot >= 0) & (slot % S == S - 1):
        page = slot // S
        h = tl.program_id(1).to(tl.int64)
        keys += page // K * keys_n + page % K * S * keys_s + h * keys_h
        row = codes + page // K * codes_n + page % K * codes_k + h * codes_h
        byte = spread + page // K * spread_n + page % K * spread_k + h * spread_h
        code_page(row, byte, keys, keys_s, keys_d, TINY, MOST, D, J, BITS, BJ, BD)


def blocks(D: int, J: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return {"BJ": min(triton.next_power_of_2(J), max(1, KEYS // BD)), "BD": BD}


def update_key_codes(codes: Tensor, keys: Tensor, slots: Tensor, bits: int) -> None:
    (_, T, H, D), K, tokens = keys.shape, codes.shape[1], slots.shape[0]
    S = T // K
    if not tokens:
        return
    spread, J = packed(codes, S, bits), code_bytes(S, bits)
    limits, codes, keys = torch.finfo(codes.dtype), bits_of(codes), bits_of(keys)
    update_key_codes_kernel[(tokens, H)](
        codes, spread, keys, slots, *codes.stride()[:3], *spread.stride()[:3], *keys.stride(),
        TINY=limits.tiny, MOST=limits.max, K=K, D=D, S=S, J=J, BITS=bits, **blocks(D, J),
    )  # fmt: skip
