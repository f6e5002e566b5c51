"""Flash-decoding over a selection of codes: parts of it in parallel, then merged.

Where a tile's tokens are of one page, its steps go into the queries, and where a value's channels
are one group, its step goes into the weights: the codes themselves are what is multiplied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.code_layout import packed
from kvplug_kernels.page_layout import PageLayout, Views
from kvplug_kernels.sparse_decode.kernel import (
    LOG2_E,
    keep_part,
    merge_kernel,
    parts_for,
    raised,
    stages,
)
from kvplug_kernels.sparse_decode.kernel import blocks as sparse_blocks

LEAST = 32  # tokens of a tile


@triton.jit
def coded_keys(
    codes, spread, page, within, valid, codes_n, spread_n, element: tl.constexpr,
    D: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Keys of tokens of any pages, rounded to an element. [BD, BT]"""
    d = tl.arange(0, BD)
    inside = (d < D)[:, None] & valid[None, :]
    low = codes + (page * codes_n)[None, :] + d[:, None]
    lo = tl.load(low, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(low + D, mask=inside, other=0.0).to(tl.float32)
    byte = spread + (page * spread_n + within % J * D)[None, :] + d[:, None]
    joined = tl.load(byte, mask=inside, other=0).to(tl.int32)
    code = (joined >> (within // J * BITS)[None, :]) & ((1 << BITS) - 1)
    return (lo + step * code.to(tl.float32)).to(element)


@triton.jit
def page_logits(
    codes, spread, within, q,
    D: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of tokens of one page, whose lo and first byte are at codes and spread. [BG, BT]"""
    d = tl.arange(0, BD)
    lo = tl.load(codes + d, mask=d < D, other=0.0).to(tl.float32)
    step = tl.load(codes + D + d, mask=d < D, other=0.0).to(tl.float32)
    wide = q.to(tl.float32)
    byte = spread + (within % J * D)[None, :] + d[:, None]
    joined = tl.load(byte, mask=(d < D)[:, None], other=0).to(tl.int32)
    code = (joined >> (within // J * BITS)[None, :]) & ((1 << BITS) - 1)
    MIDDLE: tl.constexpr = 1 << (BITS - 1)  # from there, what rounding loses is a key's own
    weighed = (wide * step[None, :]).to(q.dtype)
    logits = tl.dot(weighed, (code - MIDDLE).to(q.dtype), input_precision="ieee")
    return logits + tl.sum(wide * (lo + MIDDLE * step)[None, :], axis=1)[:, None]


@triton.jit
def value_codes(
    values, page, within, valid, values_n,
    D: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """[BT, BD]"""
    d = tl.arange(0, BD)
    inside = valid[:, None] & (d < D)[None, :]
    byte = values + (page * values_n + within * V)[:, None] + (d % V)[None, :]
    joined = tl.load(byte, mask=inside, other=0).to(tl.int32)
    return (joined >> (d // V * BITS)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def coded_values(
    values, scales, page, within, valid, values_n, scales_n, element: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Values of tokens of any pages, rounded to an element. [BT, BD]"""
    d = tl.arange(0, BD)
    inside = valid[:, None] & (d < D)[None, :]
    low = scales + (page * scales_n + within * 2 * (D // GROUP))[:, None] + (d // GROUP)[None, :]
    lo = tl.load(low, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(low + D // GROUP, mask=inside, other=0.0).to(tl.float32)
    code = value_codes(values, page, within, valid, values_n, D, V, BITS, BD)
    return (lo + step * code.to(tl.float32)).to(element)


@triton.jit
def mix_coded(
    p, acc, values, scales, page, within, valid, values_n, scales_n, element: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """acc [BG, BD] + p [BG, BT] @ values"""
    if GROUP == D:
        near = scales + page * scales_n + within * 2
        lo = tl.load(near, mask=valid, other=0.0).to(tl.float32)
        step = tl.load(near + 1, mask=valid, other=0.0).to(tl.float32)
        MIDDLE: tl.constexpr = 1 << (BITS - 1)
        code = value_codes(values, page, within, valid, values_n, D, V, BITS, BD) - MIDDLE
        weighed = (p * step[None, :]).to(element)
        acc = tl.dot(weighed, code.to(element), acc, input_precision="ieee")
        return acc + tl.sum(p * (lo + MIDDLE * step)[None, :], axis=1)[:, None]
    else:
        v = coded_values(
            values, scales, page, within, valid, values_n, scales_n, element, D, V, GROUP, BITS,
            BD,
        )  # fmt: skip
        return tl.dot(p.to(element), v, acc, input_precision="ieee")


@triton.jit
def attend_codes_kernel(
    query, codes, spread, values, scales, open_keys, open_values, open_page, page_table, chosen,
    counts, lengths, partial, weight, scale, query_b, query_h, codes_n, codes_h, spread_n,
    spread_h, values_n, values_h, scales_n, scales_h, keys_n, keys_s, keys_h, keys_d, open_n,
    open_s, open_h, open_d, table_b, chosen_b, chosen_h, counts_b, ALL: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, U: tl.constexpr,
    J: tl.constexpr, KEY_BITS: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr,
    VALUE_BITS: tl.constexpr, CAP: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BU: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    length = tl.load(lengths + b)
    newest = tl.maximum(length - 1, 0) // S
    picked = chosen + b * chosen_b + h * chosen_h
    if ALL:
        count = tl.cdiv(length, U)
    else:
        count = tl.where(length > 0, tl.load(counts + b * counts_b + h), 0)
    tokens = tl.where(count > 0, (count - 1) * U + (length - 1) % U + 1, 0)
    coded = tl.maximum(count - 1, 0) * U  # tokens before the newest page's
    if U < S:
        late = count - BU + tl.arange(0, BU)
        named = tl.load(picked + late, mask=late >= 0, other=0)
        in_newest = (late >= 0) & (named >= newest * (S // U))
        coded = tl.maximum(count - tl.sum(in_newest.to(tl.int32), axis=0), 0) * U
    share = tl.cdiv(tl.cdiv(tokens, BT), PARTS) * BT
    begin = part * share
    end = tl.minimum(begin + share, tokens)

    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    heads = (g < G)[:, None]
    channels = d < D
    head = query + b * query_b + (h * G + g[:, None]) * query_h + d[None, :]
    q = tl.load(head, mask=heads & channels[None, :], other=0.0)  # [BG, BD]
    codes += h * codes_h
    spread += h * spread_h
    values += h * values_h
    scales += h * scales_h
    page_table += b * table_b

    top = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    last = tl.minimum(end, coded)
    for start in range(begin, last, BT):
        t = start + tl.arange(0, BT)
        inside = t < last
        if FOLD:  # all of one page, and inside
            of = start // S
            if not ALL:
                of = tl.load(picked + of)
            page = tl.load(page_table + of).to(tl.int64)
            within = t % S
            logits = page_logits(
                codes + page * codes_n, spread + page * spread_n, within, q, D, J, KEY_BITS, BD
            )
        else:
            of = t // U
            if not ALL:
                of = tl.load(picked + of, mask=inside, other=0)
            token = of * U + t % U
            page = tl.load(page_table + token // S, mask=inside, other=0).to(tl.int64)
            within = token % S
            k = coded_keys(
                codes, spread, page, within, inside, codes_n, spread_n, q.dtype, D, J, KEY_BITS,
                BD,
            )  # fmt: skip
            logits = tl.dot(q, k, input_precision="ieee")
        p, top, shrink, total = raised(logits * scale, inside, top, total, CAP)
        acc = mix_coded(
            p, acc * shrink[:, None], values, scales, page, within, inside, values_n, scales_n,
            q.dtype, D, V, GROUP, VALUE_BITS, BD,
        )  # fmt: skip

    page = tl.load(open_page + b).to(tl.int64)
    open_keys += page * keys_n + h * keys_h
    open_values += page * open_n + h * open_h
    for start in range(tl.maximum(begin, coded), end, BT):
        t = start + tl.arange(0, BT)
        inside = t < end
        of = t // U
        if not ALL:
            of = tl.load(picked + of, mask=inside, other=0)
        within = of * U + t % U - newest * S
        key = open_keys + (within * keys_s)[None, :] + (d * keys_d)[:, None]
        k = tl.load(key, mask=channels[:, None] & inside[None, :], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        p, top, shrink, total = raised(logits, inside, top, total, CAP)
        value = open_values + (within * open_s)[:, None] + (d * open_d)[None, :]
        v = tl.load(value, mask=inside[:, None] & channels[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    row = (b * H + h) * G + g  # query heads in the order of the output
    keep_part(partial, weight, row * PARTS + part, acc, top, total, begin < end, G, D, BG, BD)


def blocks(G: int, D: int, S: int, unit: int, itemsize: int) -> dict[str, int]:
    """Tiles of one page where whole pages of some size are read; else each number of a tile is
    spread out in fp32, with lo and step of its own."""
    whole = S & -S  # a power of two that divides a page
    fold = unit == S and whole >= LEAST
    sizes = sparse_blocks(G, D, itemsize)
    sizes["BT"] = min(sizes["BT"], whole) if fold else LEAST
    return sizes | {"BU": triton.next_power_of_2(max(S // unit, 1)), "FOLD": fold}


def coded_decode(
    query: Tensor,
    views: Views,
    layout: PageLayout,
    open_keys: Tensor,
    open_values: Tensor,
    open_page: Tensor,
    page_table: Tensor,
    chosen: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    scale: float,
    unit: int,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    (Q, Hq, D), H = query.shape, views.keys.shape[1]
    out = torch.empty(Q, Hq, D, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    sizes = blocks(Hq // H, D, layout.page_size, unit, query.element_size())
    units = page_table.shape[1] + 1 if chosen is None else chosen.shape[2]
    PARTS = parts_for(Q * H, units * unit, sizes["BT"], query.device)
    partial = torch.empty(Q * Hq, PARTS, D, dtype=torch.float32, device=query.device)
    weight = torch.empty(Q * Hq, PARTS, dtype=torch.float32, device=query.device)
    spread = packed(views.keys, layout.page_size, layout.key_bits)
    picked = lengths if chosen is None else chosen
    taken = lengths if counts is None else counts
    attend_codes_kernel[(Q, H, PARTS)](
        query, views.keys, spread, views.values, views.scales, open_keys, open_values, open_page,
        page_table, picked, taken, lengths, partial, weight,
        scale * LOG2_E * (2 / cap if cap else 1), *query.stride()[:2], *views.keys.stride()[:2],
        *spread.stride()[:2], *views.values.stride()[:2], *views.scales.stride()[:2],
        *open_keys.stride(), *open_values.stride(), page_table.stride(0),
        *((0, 0) if chosen is None else chosen.stride()[:2]), taken.stride(0),
        ALL=chosen is None, H=H, G=Hq // H, CAP=cap * LOG2_E, PARTS=PARTS, **sizes,
        U=unit, **layout.constants(),
        num_stages=stages(torch.version.hip is not None, unit < layout.page_size, sizes["BD"],
        cap > 0),
    )  # fmt: skip
    merge_kernel[(Q * Hq,)](
        partial, weight, weight if sinks is None else sinks, out, Hq,
        SINKS=sinks is not None, D=D, PARTS=PARTS, BD=sizes["BD"],
    )  # fmt: skip
    return out
