"""One program per (block, KV head, part of its keys) sums the exponentials of each row, a group
of queries of one head; then one per (block, KV head, pages) computes the logits again and adds up
the shares. Written between the two are a row's sums alone.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.fp8 import bits
from kvplug_kernels.fp8.kernel import widened

CHANNELS = 64  # at once; more spill
MOST_ROWS = 64  # of logits at once; more spill
COLUMNS = 64  # groups of keys at once
MOST_PARTS = 16
PROGRAMS = 512  # parts are cut until there are so many
LOG2_E = math.log2(math.e)
NOWHERE = tl.constexpr(1 << 30)  # a position behind all tokens


@triton.jit
def block_of(bounds, start, pages, b, STRIDE: tl.constexpr, S: tl.constexpr):
    """-> row and position of a block's first query, the position behind its last, its groups,
    and the keys it sees; no groups where it sees none."""
    first = tl.load(bounds + b)
    begin = tl.load(start + b)
    stop = begin + tl.load(bounds + b + 1) - first
    seen = tl.minimum(tl.load(pages + b) * S, stop)
    some = (stop > begin) & (seen > 0)
    groups = tl.where(some, tl.cdiv(stop, STRIDE) - begin // STRIDE, 0)
    return first, begin, stop, groups, tl.where(some, seen, 0)


@triton.jit
def logits_of(
    query, keys, table, first, begin, stop, groups, seen, row, column, scale,
    query_t, query_g, keys_n, keys_s, keys_d,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    EACH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """row [BM]: group * G + head; column [BC]: page * EACH + group -> [BM, BC], powers of two"""
    PAGE: tl.constexpr = S // STRIDE
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    i = begin // STRIDE + row // G  # behind the block's groups: no query of its own
    head = query + (row % G) * query_g
    p, j = column // EACH, column
    if EACH > PAGE:
        c = column % EACH
        j = tl.where(c < PAGE, p * PAGE + c, NOWHERE // STRIDE)
    page = tl.load(table + p, mask=j * STRIDE < seen, other=0).to(tl.int64)
    key = keys + page * keys_n
    acc = tl.zeros([BM, BC], tl.float32)
    for step in range(STRIDE * CHUNKS):
        r, d = step // CHUNKS, step % CHUNKS * BD + tl.arange(0, BD)
        at = i * STRIDE + (STRIDE - 1 - r)
        token = j * STRIDE + r
        own = ((at >= begin) & (at < stop))[:, None]
        there = (token < seen)[None, :]
        if D % BD > 0:
            own, there = own & (d < D)[None, :], there & (d < D)[:, None]
        of = head + (first + at - begin).to(tl.int64) * query_t
        q = tl.load(of[:, None] + d[None, :], mask=own, other=0.0)
        of = key + token % S * keys_s
        k = tl.load(of[None, :] + d[:, None] * keys_d, mask=there, other=0.0)  # [BD, BC]
        acc = tl.dot(q, widened(k).to(q.dtype), acc, input_precision="ieee")
    end = tl.where(row < groups * G, tl.minimum(i, (seen - 1) // STRIDE), -1)
    return tl.where(j[None, :] <= end[:, None], acc * scale, float("-inf"))


@triton.jit
def sum_kernel(
    query, bounds, start, keys, page_table, pages, tops, totals, scale, R,
    query_t, query_h, query_g, keys_n, keys_s, keys_h, keys_d, table_b,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    EACH: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Of one part of each row: its largest logit, and the sum of the powers from there."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    first, begin, stop, groups, seen = block_of(bounds, start, pages, b, STRIDE, S)
    end = tl.cdiv(seen, S) * EACH
    share = tl.cdiv(tl.cdiv(end, BC), PARTS) * BC
    written = (h * R + (first // STRIDE + 2 * b) * G) * PARTS + part
    for top_row in range(0, groups * G, BM):
        row = top_row + tl.arange(0, BM)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        for left in range(part * share, tl.minimum((part + 1) * share, end), BC):
            x = logits_of(
                query + h * query_h, keys + h * keys_h, page_table + b * table_b,
                first, begin, stop, groups, seen, row, left + tl.arange(0, BC), scale,
                query_t, query_g, keys_n, keys_s, keys_d, G, D, S, STRIDE, EACH, BM, BC, BD,
            )  # fmt: skip
            above = tl.maximum(top, tl.max(x, axis=1))
            least = tl.where(above > float("-inf"), above, 0.0)
            total = total * tl.exp2(top - least) + tl.sum(tl.exp2(x - least[:, None]), axis=1)
            top = above
        at = written + row * PARTS
        tl.store(tops + at, top, mask=row < groups * G)
        tl.store(totals + at, total, mask=row < groups * G)


@triton.jit
def share_kernel(
    query, bounds, start, keys, page_table, pages, tops, totals, out, scale, R, P,
    query_t, query_h, query_g, keys_n, keys_s, keys_h, keys_d, table_b, out_b, out_h,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    EACH: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The mean share over a block's rows of BP pages."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    page = tl.program_id(2) * BP
    first, begin, stop, groups, seen = block_of(bounds, start, pages, b, STRIDE, S)
    read = h * R + (first // STRIDE + 2 * b) * G
    part = tl.arange(0, PARTS)
    shares = tl.zeros([BP], tl.float32)
    for top_row in range(0, tl.where(page * S < seen, groups * G, 0), BM):
        row = top_row + tl.arange(0, BM)
        rows = (row < groups * G)[:, None]
        at = (read + row)[:, None] * PARTS + part[None, :]
        parts = tl.load(tops + at, mask=rows, other=0.0)
        top = tl.max(parts, axis=1)
        powers = tl.load(totals + at, mask=rows, other=1.0) * tl.exp2(parts - top[:, None])
        total = tl.sum(powers, axis=1)
        for left in range(page * EACH, (page + BP) * EACH, BC):
            x = logits_of(
                query + h * query_h, keys + h * keys_h, page_table + b * table_b,
                first, begin, stop, groups, seen, row, left + tl.arange(0, BC), scale,
                query_t, query_g, keys_n, keys_s, keys_d, G, D, S, STRIDE, EACH, BM, BC, BD,
            )  # fmt: skip
            weights = tl.sum(tl.exp2(x - top[:, None]) / total[:, None], axis=0)  # [BC]
            shares += tl.sum(tl.reshape(weights, [BP, BC // BP]), axis=1)
    p = page + tl.arange(0, BP)
    shares = shares / tl.maximum(groups * G, 1)
    tl.store(out + b * out_b + h * out_h + p, shares, mask=p < P)


def blocks(rows: int, D: int, groups: int, hip: bool) -> dict[str, int]:
    """Of blocks of so many rows, and pages of so many groups. Loads ahead spill on AMD's GPUs."""
    BM = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    BD = min(CHANNELS, max(16, triton.next_power_of_2(D)))
    EACH = triton.next_power_of_2(groups)
    return {"EACH": EACH, "BM": BM, "BC": COLUMNS, "BD": BD, "num_stages": 1 if hip else 3}


def parts_for(programs: int, columns: int) -> int:
    """How many parts keep a GPU busy; a power of two."""
    wanted = min(triton.cdiv(PROGRAMS, programs), triton.cdiv(columns, COLUMNS), MOST_PARTS)
    return triton.next_power_of_2(max(wanted, 1))


def antidiagonal(
    query: Tensor,
    bounds: Tensor,
    start: Tensor,
    keys: Tensor,
    page_table: Tensor,
    pages: Tensor,
    stride: int,
    scale: float,
) -> Tensor:
    (T, H, G, D), S, (n, P) = query.shape, keys.shape[1], page_table.shape
    out = torch.empty(n, H, P, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    rows = triton.cdiv(T, n * stride) * G
    sizes = blocks(rows, D, S // stride, torch.version.hip is not None)
    EACH = sizes["EACH"]
    PARTS, BP = parts_for(n * H, P * EACH), max(1, COLUMNS // EACH)
    R = (T // stride + 2 * n) * G  # blocks cut no more groups than these
    tops, totals = torch.empty(2, H, R, PARTS, dtype=torch.float32, device=query.device)
    keys = bits(keys)
    inputs = (query, bounds, start, keys, page_table, pages, tops, totals)
    strides = (*query.stride()[:3], *keys.stride(), page_table.stride(0))
    rest = {"G": G, "D": D, "S": S, "STRIDE": stride, "PARTS": PARTS, **sizes}
    scale = scale / stride * LOG2_E
    sum_kernel[(n, H, PARTS)](*inputs, scale, R, *strides, **rest)
    share_kernel[(n, H, triton.cdiv(P, BP))](
        *inputs, out, scale, R, P, *strides, *out.stride()[:2], BP=BP, **rest
    )
    return out
