"""One program per (token, block of heads); the first token of a page's run works for all of it."""

import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.fp8 import bits
from kvplug_kernels.fp8.kernel import narrowed, widened

TOKENS = 16  # keys read at once
COLUMNS = 256  # channels of neighbouring heads that a program takes


@triton.jit
def update_page_digest_kernel(
    digest, keys, slots, tokens, digest_n, digest_k, digest_h, digest_x, keys_t, keys_h,
    K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    before = tl.load(slots + t - 1, mask=t > 0, other=-1)
    if (slot >= 0) & ((before < 0) | (before // S != slot // S)):
        page = slot // S
        offset = (slot % S).to(tl.int32)
        column = tl.arange(0, BH * BD)
        h = (tl.program_id(1) * BH + column // BD).to(tl.int64)
        d = column % BD
        inside = (h < H) & (d < D)
        low = digest + page // K * digest_n + page % K * digest_k + h * digest_h + d
        known = inside & (d < tl.where(offset > 0, D, 0))  # a page begun now holds nothing yet
        lo = widened(tl.load(low, mask=known, other=0.0)).to(tl.float32)
        hi = widened(tl.load(low + digest_x, mask=known, other=0.0)).to(tl.float32)
        lo, hi = tl.where(known, lo, float("inf")), tl.where(known, hi, float("-inf"))
        for start in range(0, S - offset, BT):
            near = t + start + tl.arange(0, BT)
            there = tl.load(slots + near, mask=near < tokens, other=-1)
            ours = ((there >= 0) & (there // S == page))[:, None] & inside[
                None, :
            ]  # [BT, BH * BD]
            key = keys + near[:, None] * keys_t + (h * keys_h + d)[None, :]
            k = widened(tl.load(key, mask=ours, other=0.0)).to(tl.float32)
            lo = tl.minimum(lo, tl.min(tl.where(ours, k, float("inf")), axis=0))
            hi = tl.maximum(hi, tl.max(tl.where(ours, k, float("-inf")), axis=0))
        tl.store(low, narrowed(lo, digest.dtype.element_ty), mask=inside)
        tl.store(low + digest_x, narrowed(hi, digest.dtype.element_ty), mask=inside)


def blocks(D: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return {"BT": TOKENS, "BH": max(1, COLUMNS // BD), "BD": BD}


def update_page_digest(digest: Tensor, keys: Tensor, slots: Tensor, page_size: int) -> None:
    _, K, H, _, D = digest.shape
    tokens = slots.shape[0]
    if not tokens:
        return
    sizes, digest, keys = blocks(D), bits(digest), bits(keys)
    update_page_digest_kernel[(tokens, triton.cdiv(H, sizes["BH"]))](
        digest, keys, slots, tokens, *digest.stride()[:4], *keys.stride()[:2],
        K=K, H=H, D=D, S=page_size, **sizes,
    )  # fmt: skip
