"""Plain torch, and what a CPU runs: the best of keys that no two pages share."""

import torch
from torch import Tensor

NONE = float("-inf")


def page_select(
    scores: Tensor,
    pages: Tensor,
    keep: Tensor,
    width: int,
    top_p: float | None = None,
    minimum: int = 1,
) -> tuple[Tensor, Tensor]:
    B, H, P = scores.shape
    chosen = torch.zeros(B, H, width, dtype=torch.int32, device=scores.device)
    least = pages.clamp(max=minimum)
    counts = keep.minimum(pages).clamp(max=width).maximum(least)[:, None].repeat(1, H)
    widest = int(counts.max()) if counts.numel() else 0
    if not widest:
        return chosen, counts

    last = (pages - 1).long()[:, None, None]
    rivals = scores.nan_to_num(nan=NONE, posinf=float("inf"), neginf=NONE)
    rivals.masked_fill_(torch.arange(P, device=scores.device) >= last, NONE)
    best = ranks(rivals).topk(widest - 1).indices
    if top_p is not None:
        end = scores.gather(2, last.clamp(min=0).expand(B, H, 1))
        enough = fewest(top_p, end, rivals, rivals.gather(2, best))
        counts = counts.minimum(enough.maximum(least[:, None]))

    place = torch.arange(widest, device=scores.device)
    taken = torch.cat([last.expand(B, H, 1), best], 2)
    taken = taken.masked_fill(place >= counts[:, :, None], P).sort(2).values
    chosen[:, :, :widest] = taken.masked_fill_(taken == P, 0)
    return chosen, counts


def ranks(scores: Tensor) -> Tensor:
    """[..., P] fp32 without NaN -> int64 in the same order, the lower index above its equals."""
    bits = scores.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(1 << 31) - bits, bits)  # a float is a sign and a magnitude
    column = torch.arange(scores.shape[-1], device=scores.device)
    return ordered.bitwise_left_shift_(32).sub_(column)


def fewest(top_p: float, end: Tensor, rivals: Tensor, best: Tensor) -> Tensor:
    """end [B, H, 1], rivals [B, H, P], best [B, H, k] of them -> pages that reach top_p [B, H]."""
    total = torch.logaddexp(rivals.logsumexp(2, keepdim=True), end)
    mass = (torch.cat([end, best], 2) - total).exp().cumsum(2)
    return 1 + (mass[:, :, :-1] < top_p).sum(2).int()
