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
    sinks: int = 0,
    newest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, H, P = scores.shape
    chosen = torch.zeros(B, H, width, dtype=torch.int32, device=scores.device)
    least = pages.clamp(max=minimum)
    most = keep.minimum(pages).clamp(max=width).maximum(least)
    ends = (torch.ones_like(pages) if newest is None else newest.clamp(min=1)).minimum(most)
    begins = (most - ends).minimum(pages - ends).clamp(max=sinks)
    least, counts = least.maximum(begins + ends), most[:, None].repeat(1, H)
    widest = int(most.max()) if most.numel() else 0
    if not widest:
        return chosen, counts

    page = torch.arange(P, device=scores.device)
    behind = (page >= pages[:, None])[:, None]
    certain = (page < begins[:, None]) | (page >= (pages - ends)[:, None])
    certain = certain[:, None] & ~behind  # taken whatever they score
    rivals = scores.nan_to_num(nan=NONE, posinf=float("inf"), neginf=NONE)
    rivals.masked_fill_(behind | certain, NONE)
    limits = torch.iinfo(torch.int64)
    ranked = ranks(rivals).masked_fill_(behind, limits.min).masked_fill_(certain, limits.max)
    best = ranked.topk(widest).indices
    if top_p is not None:
        enough = fewest(top_p, scores.masked_fill(~certain, NONE), rivals, best)
        counts = counts.minimum(enough.maximum(least[:, None]))

    place = torch.arange(widest, device=scores.device)
    taken = best.masked_fill(place >= counts[:, :, None], P).sort(2).values
    chosen[:, :, :widest] = taken.masked_fill_(taken == P, 0)
    return chosen, counts


def ranks(scores: Tensor) -> Tensor:
    """[..., P] fp32 without NaN -> int64 in the same order, the lower index above its equals."""
    bits = scores.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(1 << 31) - bits, bits)  # a float is a sign and a magnitude
    column = torch.arange(scores.shape[-1], device=scores.device)
    return ordered.bitwise_left_shift_(32).sub_(column)


def fewest(top_p: float, certain: Tensor, rivals: Tensor, best: Tensor) -> Tensor:
    """How many of the best [B, H, k], the certain among them first, reach top_p. -> [B, H]"""
    total = torch.logaddexp(rivals.logsumexp(2, keepdim=True), certain.logsumexp(2, keepdim=True))
    scores = certain.maximum(rivals).gather(2, best)
    mass = (scores - total).exp().cumsum(2)
    return 1 + (mass[:, :, :-1] < top_p).sum(2).int()
