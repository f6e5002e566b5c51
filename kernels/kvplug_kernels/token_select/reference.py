"""Plain torch: sort by weight, the lower index first among equals."""

import torch
from torch import Tensor

NONE, MOST = float("-inf"), torch.finfo(torch.float32).max


def token_select(
    logits: Tensor,
    heads: int,
    lengths: Tensor,
    page_size: int,
    keep: Tensor,
    width: int,
    scale: float,
    top_p: float | None,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    B, T = logits.shape[0], logits.shape[2]
    scored = (lengths - 1).clamp(min=0) // page_size * page_size  # [B]
    least = lengths.clamp(max=page_size + sinks)
    most = keep.minimum(lengths).clamp(max=width).maximum(least)
    fresh = lengths - scored  # tokens of the newest page

    t = torch.arange(T, device=logits.device)
    weights = mean_weights(logits * scale, heads, t >= scored[:, None])  # [B, H, T]
    ranked = weights.masked_fill(t < sinks, float("inf"))
    ranked.masked_fill_((t >= scored[:, None])[:, None], NONE)
    order = ranked.sort(dim=2, descending=True, stable=True).indices
    wanted = (most - fresh)[:, None].expand(B, heads)  # scored tokens that are taken
    if top_p is not None:
        shares = weights.gather(2, order).double().cumsum(2)
        short = shares < top_p * weights.sum(2, keepdim=True, dtype=torch.double)
        enough = (short.sum(2) + weights.any(2)).maximum((least - fresh)[:, None])
        wanted = wanted.minimum(enough.to(wanted))

    rank = torch.empty_like(order).scatter_(2, order, t.expand_as(order))
    taken = torch.zeros(B, heads, T + page_size, dtype=torch.bool, device=logits.device)
    taken[:, :, :T] = rank < wanted[:, :, None]
    t = torch.arange(T + page_size, device=logits.device)
    taken |= ((t >= scored[:, None]) & (t < lengths[:, None]))[:, None]
    counts = taken.sum(2, dtype=torch.int32)
    chosen = torch.zeros(B, heads, width, dtype=torch.int32, device=logits.device)
    b, h, token = taken.nonzero(as_tuple=True)
    chosen[b, h, taken.cumsum(2)[taken] - 1] = token.int()
    return chosen, counts


def mean_weights(logits: Tensor, heads: int, unscored: Tensor) -> Tensor:
    """Mean softmax over the query heads of each KV head. logits [B, Hq, T] -> [B, H, T]"""
    known = logits.nan_to_num(nan=NONE, posinf=MOST, neginf=NONE)
    known.masked_fill_(unscored[:, None], NONE)
    weights = known.softmax(2).nan_to_num_(0.0)  # a row of -inf weighs nothing
    return weights.unflatten(1, (heads, -1)).mean(2)
