"""Flash-decoding over a selection: parts of it in parallel, a softmax each, then merged."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.fp8 import bits
from kvplug_kernels.fp8.kernel import widened

KEY_BYTES = (
    16 << 10
)  # keys read at once, and as many values; more spills or overflows 64 KiB of LDS
MOST_PARTS = 64
PROGRAMS_PER_CORE = 4  # parts are cut until so many programs wait for a multiprocessor
LOG2_E = math.log2(math.e)


@triton.jit
def raised(logits, inside, top, total, CAP: tl.constexpr):
    """Of more logits [BG, BT]: powers of two, the largest so far, what that makes of what was
    summed before, and the sum with them."""
    if CAP > 0:  # tanh is 1 - 2 / (1 + exp(2x)); a division would spill
        logits = CAP * (1 - tl.exp2(1 - tl.log2(1 + tl.exp2(logits))))
    logits = tl.where(inside[None, :], logits, float("-inf"))
    above = tl.maximum(top, tl.max(logits, axis=1))
    shrink = tl.exp2(top - above)
    p = tl.exp2(logits - above[:, None])
    return p, above, shrink, total * shrink + tl.sum(p, axis=1)


@triton.jit
def attend_kernel(
    query, keys, values, page_table, chosen, counts, lengths, partial, weight, scale,
    query_b, query_h, keys_n, keys_s, keys_h, keys_d, values_n, values_s, values_h, values_d,
    table_b, chosen_b, chosen_h, counts_b,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, U: tl.constexpr,
    CAP: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    count = tl.load(counts + b * counts_b + h)
    tail = (tl.load(lengths + b) - 1) % U + 1
    tokens = tl.where(count > 0, (count - 1) * U + tail, 0)
    share = tl.cdiv(tl.cdiv(tokens, BT), PARTS) * BT
    begin = part * share
    end = tl.minimum(begin + share, tokens)

    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    heads = (g < G)[:, None]
    channels = d < D
    head = query + b * query_b + (h * G + g[:, None]) * query_h + d[None, :]
    q = tl.load(head, mask=heads & channels[None, :], other=0.0)  # [BG, BD]

    top = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        inside = t < end
        of = tl.load(chosen + b * chosen_b + h * chosen_h + t // U, mask=inside, other=0)
        token = of * U + t % U
        page = tl.load(page_table + b * table_b + token // S, mask=inside, other=0).to(tl.int64)
        key = keys + page * keys_n + (token % S) * keys_s + h * keys_h
        k = tl.load(
            key[None, :] + d[:, None] * keys_d, mask=channels[:, None] & inside[None, :], other=0.0
        )  # [BD, BT]
        k = widened(k).to(q.dtype)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        p, above, shrink, total = raised(logits, inside, top, total, CAP)
        value = values + page * values_n + (token % S) * values_s + h * values_h
        v = tl.load(
            value[:, None] + d[None, :] * values_d,
            mask=inside[:, None] & channels[None, :],
            other=0.0,
        )  # [BT, BD]
        v = widened(v).to(q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = above

    row = (b * H + h) * G + g  # query heads in the order of the output
    keep_part(partial, weight, row * PARTS + part, acc, top, total, begin < end, G, D, BG, BD)


@triton.jit
def keep_part(
    partial, weight, at, acc, top, total, some,
    G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    g, d = tl.arange(0, BG), tl.arange(0, BD)
    total = tl.where(some, total, 1.0)
    mixed = acc / total[:, None]
    filled = (g < tl.where(some, G, 0))[:, None] & (d < D)[None, :]
    tl.store(partial + at[:, None] * D + d[None, :], mixed, mask=filled)
    tl.store(weight + at, top + tl.log2(total), mask=g < G)  # -inf where the part is empty


@triton.jit
def merge_kernel(
    partial, weight, sinks, out, Hq,
    SINKS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, BD)
    w = tl.load(weight + row * PARTS + part)  # log2 of each part's sum of exponentials
    top = tl.max(w, axis=0)
    if SINKS:
        sink = tl.load(sinks + row % Hq).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    w = tl.exp2(w - tl.where(top > float("-inf"), top, 0.0))
    some = (w > 0)[:, None] & (d < D)[None, :]
    acc = tl.load(partial + (row * PARTS + part[:, None]) * D + d[None, :], mask=some, other=0.0)
    total = tl.sum(w, axis=0)
    if SINKS:
        total += tl.exp2(sink - top)
    mixed = tl.sum(acc * w[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + d, mixed.to(out.dtype.element_ty), mask=d < D)


def read_as(keys: Tensor) -> int:
    """Bytes of a key's element in registers: eight bits are fp32 for a while."""
    return 4 if keys.element_size() == 1 else keys.element_size()


def blocks(G: int, D: int, itemsize: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    BT = min(128, max(32, KEY_BYTES // (BD * itemsize)))
    return {"BG": max(16, triton.next_power_of_2(G)), "BT": BT, "BD": BD}


def stages(hip: bool, scattered: bool, BD: int, capped: bool) -> int:
    """64 KiB of LDS against 163 KiB and more; wide keys that lie apart spill their addresses, and
    on AMD's GPUs a cap does."""
    if hip:
        return 1 if capped else 2
    return 2 if scattered and BD > 128 else 3


def parts_for(rows: int, tokens: int, BT: int, device: torch.device) -> int:
    """How many parts keep every multiprocessor busy; a power of two."""
    if device.type != "cuda":
        return 2
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(triton.cdiv(cores * PROGRAMS_PER_CORE, rows), triton.cdiv(tokens, BT), MOST_PARTS)
    return triton.next_power_of_2(max(wanted, 1))


def sparse_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    scale: float,
    unit: int,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    B, Hq, D = query.shape
    S, H = keys.shape[1:3]
    out = torch.empty(B, Hq, D, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    sizes = blocks(Hq // H, D, read_as(keys))
    keys, values = bits(keys), bits(values)
    PARTS = parts_for(B * H, chosen.shape[2] * unit, sizes["BT"], query.device)
    partial = torch.empty(B * Hq, PARTS, D, dtype=torch.float32, device=query.device)
    weight = torch.empty(B * Hq, PARTS, dtype=torch.float32, device=query.device)
    attend_kernel[(B, H, PARTS)](
        query, keys, values, page_table, chosen, counts, lengths, partial, weight,
        scale * LOG2_E * (2 / cap if cap else 1), *query.stride()[:2], *keys.stride(),
        *values.stride(), page_table.stride(0), *chosen.stride()[:2], counts.stride(0),
        H=H, G=Hq // H, D=D, S=S, U=unit, CAP=cap * LOG2_E, PARTS=PARTS, **sizes,
        num_stages=stages(torch.version.hip is not None, unit < S, sizes["BD"], cap > 0),
    )  # fmt: skip
    merge_kernel[(B * Hq,)](
        partial, weight, weight if sinks is None else sinks, out, Hq,
        SINKS=sinks is not None, D=D, PARTS=PARTS, BD=sizes["BD"],
    )  # fmt: skip
    return out
