"""One program per (prompt, KV head, block of kept tokens); what is read is never written."""

import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.fp8 import bits

ELEMENTS = 4096  # of the cache that a program copies


@triton.jit
def pack_tokens_kernel(
    cache, pages, tokens, keep, targets, H, K,
    cache_n, cache_h, cache_s, pages_j, tokens_j, tokens_h, targets_j,
    S: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j, h = row // H, row % H
    k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    kept = (k < tl.load(keep + j)) & (k < K)
    token = tl.load(tokens + j * tokens_j + h * tokens_h + k, mask=kept, other=0).to(tl.int64)
    source = tl.load(pages + j * pages_j + token // S, mask=kept, other=0).to(tl.int64)
    target = tl.load(targets + j * targets_j + k // S, mask=kept, other=0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = kept[:, None] & (c < C)[None, :]
    head = cache + h * cache_h + c[None, :]
    copied = tl.load(head + (source * cache_n + token % S * cache_s)[:, None], mask=inside)
    tl.store(head + (target * cache_n + k % S * cache_s)[:, None], copied, mask=inside)


def blocks(C: int) -> dict[str, int]:
    BC = triton.next_power_of_2(C)
    return {"BK": max(1, ELEMENTS // BC), "BC": BC}


def pack_tokens(
    cache: Tensor, pages: Tensor, tokens: Tensor, keep: Tensor, targets: Tensor
) -> None:
    _, _, S, C = cache.shape
    J, H, K = tokens.shape
    if not tokens.numel():
        return
    sizes, cache = blocks(C), bits(cache)
    pack_tokens_kernel[(J * H, triton.cdiv(K, sizes["BK"]))](
        cache, pages, tokens, keep, targets, H, K, *cache.stride()[:3],
        pages.stride(0), *tokens.stride()[:2], targets.stride(0),
        S=S, C=C, **sizes,
    )  # fmt: skip
