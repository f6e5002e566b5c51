"""Plain torch, and what a CPU runs before Numba has compiled anything."""

import torch
from torch import Tensor


def resident_pages(
    cache: Tensor,
    held: Tensor,
    host: Tensor,
    rows: Tensor,
    hot: Tensor,
    away: Tensor,
    chosen: Tensor,
    counts: Tensor,
    behind: Tensor,
    first: int,
    columns: Tensor,
) -> None:
    (_, _, K), J = chosen.shape, hot.shape[1]
    named = torch.arange(K, device=chosen.device) < counts[:, :, None]  # [B, H, K]
    page = chosen.masked_fill(~named, 0)
    far = named & (page < away[:, None, None])
    there = held[hot.long()].transpose(1, 2)  # [B, H, J]
    equal = far[..., None] & (page[..., None] == there[:, :, None])  # [B, H, K, J]
    missing = far & ~equal.any(3)
    unread = ~equal.any(2)  # [B, H, J]
    order = unread.int().argsort(dim=2, descending=True, stable=True)  # those first, in order
    rank = (missing.cumsum(2) - 1).clamp(0, J - 1)
    seat = torch.where(missing, order.gather(2, rank), equal.int().argmax(3))
    near = page - away[:, None, None] + behind[:, None, None]
    columns.copy_(torch.where(far, seat, near).masked_fill_(~named, 0))

    b, h, k = missing.nonzero(as_tuple=True)  # one entry per page copied
    target, number = hot[b, seat[b, h, k]].long(), page[b, h, k]
    cache[target, h] = host[rows[b, number.long()].long() - first, h]
    held[target, h] = number
