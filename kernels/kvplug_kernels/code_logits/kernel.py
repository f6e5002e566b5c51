"""One program per (request, KV head, block of bytes); a byte is read once for its group.

A program spreads its bytes place by place: the codes of one shift are keys of the cache's dtype,
one product with the group's queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes, packed
from kvplug_kernels.fp8 import bits as bits_of
from kvplug_kernels.fp8.kernel import widened

BYTES = 32  # of a channel; each holds the codes of 8 / bits tokens
CHANNELS = 128  # at once; more spill


@triton.jit
def code_logits_kernel(
    query, codes, spread, page_table, pages, wanted, out, P, query_b, query_h,
    codes_n, codes_k, codes_h, spread_n, spread_k, spread_h, table_b, wanted_b, wanted_h,
    out_b, out_h, SOME: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
    BITS: tl.constexpr, BG: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    count = tl.load(pages + b)
    column = tl.program_id(2) * BJ + tl.arange(0, BJ)  # bytes of the row's pages, side by side
    p, j = column // J, column % J
    g = tl.arange(0, BG)
    heads = (g < G)[:, None]
    row = out + b * out_b + (h * G + g[:, None]) * out_h + (p * S + j)[None, :]
    written = heads & (p < P)[None, :]
    if tl.program_id(2) * BJ >= count * J:  # where a graph keeps the longest request's programs
        for place in tl.static_range(8 // BITS):
            tl.store(row + place * J, tl.full([BG, BJ], float("-inf"), tl.float32), mask=written)
        return
    valid = p < count
    if SOME:
        each = wanted + b * wanted_b + h * wanted_h + p
        valid = valid & (tl.load(each, mask=valid, other=0) != 0)
    block = tl.load(page_table + b * table_b + p // K, mask=valid, other=0).to(tl.int64)
    low = codes + block * codes_n + p % K * codes_k + h * codes_h
    byte = spread + block * spread_n + p % K * spread_k + h * spread_h + j * D
    head = query + b * query_b + (h * G + g) * query_h
    for place in tl.static_range(8 // BITS):
        logits = tl.zeros([BG, BJ], tl.float32)
        for start in tl.static_range(0, D, BD):
            d = start + tl.arange(0, BD)
            q = tl.load(head[:, None] + d[None, :], mask=heads & (d < D)[None, :], other=0.0)
            inside = (d < D)[:, None] & valid[None, :]
            lo = widened(tl.load(low[None, :] + d[:, None], mask=inside, other=0.0))
            step = widened(tl.load(low[None, :] + (D + d)[:, None], mask=inside, other=0.0))
            joined = tl.load(byte[None, :] + d[:, None], mask=inside, other=0)
            code = ((joined >> (place * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
            key = (lo.to(tl.float32) + step.to(tl.float32) * code).to(q.dtype)  # [BD, BJ]
            logits = tl.dot(q, key, logits, input_precision="ieee")
        logits = tl.where(valid[None, :], logits, float("-inf"))
        tl.store(row + place * J, logits, mask=written)


def blocks(G: int, D: int) -> dict[str, int]:
    BG = max(16, triton.next_power_of_2(G))  # tl.dot takes no fewer than 16 rows
    return {"BG": BG, "BJ": BYTES, "BD": min(CHANNELS, triton.next_power_of_2(D))}


def code_logits(
    query: Tensor,
    codes: Tensor,
    page_table: Tensor,
    pages: Tensor,
    page_size: int,
    bits: int,
    wanted: Tensor | None,
) -> Tensor:
    B, Hq, D = query.shape
    (K, H), J = codes.shape[1:3], code_bytes(page_size, bits)
    P = page_table.shape[1] * K
    out = torch.empty(B, Hq, P * page_size, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    spread = packed(codes, page_size, bits)
    codes = bits_of(codes)
    mask = pages if wanted is None else wanted.view(torch.uint8)  # without one, nothing is read
    code_logits_kernel[(B, H, triton.cdiv(P * J, BYTES))](
        query, codes, spread, page_table, pages, mask, out, P, *query.stride()[:2],
        *codes.stride()[:3], *spread.stride()[:3], page_table.stride(0),
        *(mask.stride()[:2] if wanted is not None else (0, 0)), *out.stride()[:2],
        SOME=wanted is not None, K=K, G=Hq // H, D=D, S=page_size, J=J, BITS=bits,
        **blocks(Hq // H, D),
    )  # fmt: skip
    return out
