"""One program per (block, query head)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048  # of queries read at once; more spill


@triton.jit
def block_mean_kernel(
    query, bounds, out, query_t, query_h, out_n, out_h,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    begin = tl.load(bounds + block)
    end = tl.load(bounds + block + 1)
    d = tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        row = query + h * query_h + t.to(tl.int64)[:, None] * query_t
        inside = (t < end)[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(row + d[None, :], mask=inside, other=0.0).to(tl.float32), axis=0)
    mean = total / tl.maximum(end - begin, 1)
    tl.store(out + block * out_n + h * out_h + d, mean, mask=d < D)


def blocks(D: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return {"BT": max(1, min(64, NUMBERS // BD)), "BD": BD}


def block_mean(query: Tensor, bounds: Tensor) -> Tensor:
    n, (_, Hq, D) = len(bounds) - 1, query.shape
    out = torch.empty(n, Hq, D, dtype=torch.float32, device=query.device)
    if out.numel():
        block_mean_kernel[(n, Hq)](
            query, bounds, out, *query.stride()[:2], *out.stride()[:2], D=D, **blocks(D)
        )
    return out
