"""One program per (page, KV head, some of its values), the first of which codes its keys too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes, packed
from kvplug_kernels.key_codes.kernel import blocks as key_blocks
from kvplug_kernels.key_codes.kernel import code_page, nearest, step_of
from kvplug_kernels.page_layout import PageLayout, Views

NUMBERS = 2048  # of values at once


@triton.jit
def group_scales(
    value, inside, values_d, n, TINY: tl.constexpr, MOST: tl.constexpr, LEVELS: tl.constexpr,
    GROUP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """lo and step of the n-th group of each token. [BT] fp32"""
    c = tl.arange(0, BC)
    near = value[:, None] + ((n * GROUP + c) * values_d)[None, :]
    read = inside[:, None] & (c < GROUP)[None, :]
    v = tl.load(near, mask=read, other=0.0).to(tl.float32)
    lo = tl.min(tl.where((c < GROUP)[None, :], v, float("inf")), axis=1)
    hi = tl.max(tl.where((c < GROUP)[None, :], v, float("-inf")), axis=1)
    return lo, step_of(hi - lo, LEVELS, TINY, MOST, value.dtype.element_ty)


@triton.jit
def encode_pages_kernel(
    codes, spread, rows, scales, keys, values, pages, sources, codes_n, codes_h, spread_n,
    spread_h, rows_n, rows_h, scales_n, scales_h, keys_n, keys_s, keys_h, keys_d, values_n,
    values_s, values_h, values_d, SOME: tl.constexpr, TINY: tl.constexpr, MOST: tl.constexpr,
    D: tl.constexpr, S: tl.constexpr, J: tl.constexpr, KEY_BITS: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    page = tl.load(pages + i).to(tl.int64)
    if page >= 0:
        if SOME:
            i = tl.load(sources + i).to(tl.int64)
        if tl.program_id(2) == 0:
            code_page(
                codes + page * codes_n + h * codes_h, spread + page * spread_n + h * spread_h,
                keys + i * keys_n + h * keys_h, keys_s, keys_d, TINY, MOST, D, J, KEY_BITS, BJ,
                BD,
            )  # fmt: skip
        t = tl.program_id(2) * BT + tl.arange(0, BT)
        inside = t < S
        value = values + i * values_n + h * values_h + t * values_s
        NG: tl.constexpr = D // GROUP
        LEVELS: tl.constexpr = (1 << VALUE_BITS) - 1
        j = tl.arange(0, BV)
        joined = tl.zeros([BT, BV], tl.int32)
        for place in tl.static_range(8 // VALUE_BITS):
            d = place * V + j
            lo = tl.zeros([BT, BV], tl.float32)
            step = tl.full([BT, BV], 1.0, tl.float32)
            for n in tl.static_range(NG):
                if n * GROUP < place * V + V and n * GROUP + GROUP > place * V:
                    low, each = group_scales(
                        value, inside, values_d, n, TINY, MOST, LEVELS, GROUP, BC
                    )
                    near = scales + page * scales_n + h * scales_h + t * 2 * NG + n
                    tl.store(near, low.to(scales.dtype.element_ty), mask=inside)
                    tl.store(near + NG, each, mask=inside)
                    own = (d // GROUP == n)[None, :]
                    lo = tl.where(own, low[:, None], lo)
                    step = tl.where(own, each.to(tl.float32)[:, None], step)
            read = inside[:, None] & (j < V)[None, :]
            v = tl.load(value[:, None] + (d * values_d)[None, :], mask=read, other=0.0)
            joined |= nearest(v.to(tl.float32), lo, step, LEVELS) << (place * VALUE_BITS)
        byte = rows + page * rows_n + h * rows_h + (t * V)[:, None] + j[None, :]
        tl.store(byte, joined.to(tl.uint8), mask=inside[:, None] & (j < V)[None, :])


def blocks(layout: PageLayout) -> dict[str, int]:
    J = code_bytes(layout.page_size, layout.key_bits)
    BC, BV = (triton.next_power_of_2(n) for n in (layout.group, layout.value_row))
    tokens = max(1, NUMBERS // max(BC, BV))
    BT = min(triton.next_power_of_2(layout.page_size), tokens)
    return key_blocks(layout.head_size, J) | {"BT": BT, "BC": BC, "BV": BV}


def encode_pages(
    views: Views,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    layout: PageLayout,
    sources: Tensor | None = None,
) -> None:
    H, S = keys.shape[2], layout.page_size
    if not len(pages):
        return
    spread, limits = packed(views.keys, S, layout.key_bits), torch.finfo(layout.dtype)
    sizes = blocks(layout)
    encode_pages_kernel[(len(pages), H, triton.cdiv(S, sizes["BT"]))](
        views.keys, spread, views.values, views.scales, keys, values, pages,
        pages if sources is None else sources, *views.keys.stride()[:2], *spread.stride()[:2],
        *views.values.stride()[:2], *views.scales.stride()[:2], *keys.stride(), *values.stride(),
        SOME=sources is not None, TINY=limits.tiny, MOST=limits.max, **layout.constants(), **sizes,
    )  # fmt: skip
