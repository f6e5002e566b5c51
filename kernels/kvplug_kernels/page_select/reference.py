"""Plain torch, and what a CPU runs: the lowest score that is taken is a threshold."""

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

    last = (pages - 1).long()[:, None].expand(B, H)
    others = torch.arange(P, device=scores.device) < last[:, :, None]  # [B, H, P]
    rivals = scores.where(others & (scores > NONE), NONE)  # a NaN counts as -inf
    best = rivals.topk(widest - 1).values
    if top_p is not None:
        end = scores.gather(2, last.clamp(min=0)[:, :, None])
        counts = counts.minimum(fewest(top_p, end, rivals, best).maximum(least[:, None]))

    needed = (counts - 1).clamp(min=0).long()  # besides the last page
    if widest > 1:
        threshold = best.gather(2, (needed - 1).clamp(min=0)[:, :, None])
        threshold.masked_fill_((needed == 0)[:, :, None], float("nan"))  # nothing reaches it
        taken = others & (rivals >= threshold)
        surplus = taken.sum(2) - needed
        if surplus.any():
            equal = taken & (rivals == threshold)
            wanted = equal.sum(2) - surplus
            taken &= ~equal | (equal.cumsum(2) <= wanted[:, :, None])
        row, page = taken.view(B * H, P).nonzero(as_tuple=True)  # pages ascend within a row
        before = needed.view(-1).cumsum(0) - needed.view(-1)
        rank = torch.arange(len(row), device=row.device) - before[row]
        chosen.view(B * H, width)[row, rank] = page.int()
    chosen.scatter_(2, needed[:, :, None], last.clamp(min=0).int()[:, :, None])
    return chosen, counts


def fewest(top_p: float, end: Tensor, rivals: Tensor, best: Tensor) -> Tensor:
    """end [B, H, 1], rivals [B, H, P], best [B, H, k] of them -> pages that reach top_p [B, H]."""
    total = torch.logaddexp(rivals.logsumexp(2, keepdim=True), end)
    mass = (torch.cat([end, best], 2) - total).exp().cumsum(2)
    return 1 + (mass[:, :, :-1] < top_p).sum(2).int()
