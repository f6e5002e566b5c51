"""One program per (request, KV head, block of pages); a digest is read once for its group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.fp8 import bits
from kvplug_kernels.fp8.kernel import widened

CHANNELS = 4096  # of the digests read at once; more spill


@triton.jit
def page_bound_kernel(
    query, digest, page_table, pages, out, P, query_b, query_h,
    digest_n, digest_k, digest_h, digest_x, table_b, out_b, out_h,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    count = tl.load(pages + b)
    start = tl.program_id(2) * BP
    p = start + tl.arange(0, BP)
    if start >= count:  # most of a short request's programs, where a graph keeps the longest's
        tl.store(out + b * out_b + h * out_h + p, float("-inf"), mask=p < P)
        return
    valid = p < count
    block = tl.load(page_table + b * table_b + p // K, mask=valid, other=0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = (d < D)[:, None] & valid[None, :]
    page = digest + block * digest_n + p % K * digest_k + h * digest_h
    low = page[None, :] + d[:, None]
    lo = tl.load(low, mask=inside, other=0.0)  # [BD, BP]
    hi = tl.load(low + digest_x, mask=inside, other=0.0)  # [BD, BP]
    g = tl.arange(0, BG)
    head = query + b * query_b + (h * G + g[:, None]) * query_h + d[None, :]
    q = tl.load(head, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)  # [BG, BD]
    lo, hi = widened(lo).to(q.dtype), widened(hi).to(q.dtype)
    zero = tl.zeros_like(q)
    below, above = tl.where(q < 0, q, zero), tl.where(q > 0, q, zero)
    if LEVELS:  # the second row is a step
        below, above = q, (above * LEVELS).to(q.dtype)
    bound = tl.dot(below, lo, input_precision="ieee")
    bound = tl.dot(above, hi, bound, input_precision="ieee")  # [BG, BP]
    bound = tl.max(tl.where((g < G)[:, None], bound, float("-inf")), axis=0)
    bound = tl.where(valid, bound, float("-inf"))
    tl.store(out + b * out_b + h * out_h + p, bound, mask=p < P)


def blocks(G: int, D: int) -> dict[str, int]:
    BG = max(16, triton.next_power_of_2(G))  # tl.dot takes no fewer than 16 rows
    BD = triton.next_power_of_2(D)
    return {"BG": BG, "BP": min(32, max(16, CHANNELS // BD)), "BD": BD}


def page_bound(
    query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor, levels: int | None
) -> Tensor:
    B, Hq, D = query.shape
    K, H = digest.shape[1:3]
    P = page_table.shape[1] * K
    out = torch.empty(B, H, P, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    sizes, digest = blocks(Hq // H, D), bits(digest)
    page_bound_kernel[(B, H, triton.cdiv(P, sizes["BP"]))](
        query, digest, page_table, pages, out, P, *query.stride()[:2], *digest.stride()[:4],
        page_table.stride(0), *out.stride()[:2], K=K, G=Hq // H, D=D, LEVELS=levels or 0,
        **sizes,
    )  # fmt: skip
    return out
