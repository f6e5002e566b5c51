"""Plain torch."""

import torch
from torch import Tensor


def slot_lists(
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    chosen: Tensor | None,
    counts: Tensor | None,
    bounds: Tensor,
    slots: Tensor,
) -> None:
    if chosen is None or counts is None:
        chosen = torch.arange(page_table.shape[1], device=page_table.device)[None, None]
        counts = ((lengths + page_size - 1) // page_size)[:, None]
        chosen = chosen.expand(len(counts), -1, -1)
    (B, H, K), S = chosen.shape, page_size
    named = torch.arange(K, device=chosen.device) < counts[:, :, None]  # [B, H, K]
    logical = chosen.masked_fill(~named, 0).long().reshape(B, H * K)
    page = page_table.gather(1, logical).view(B, H, K, 1).long()
    head = torch.arange(H, device=chosen.device)[:, None, None]
    found = (page * S + torch.arange(S, device=chosen.device)) * H + head  # [B, H, K, S]
    tail = (lengths - 1) % S + 1  # [B], tokens of the last page
    tokens = ((counts - 1) * S + tail[:, None]).masked_fill(counts == 0, 0).view(B * H)
    bounds[0] = 0
    bounds[1:] = tokens.cumsum(0)
    read = torch.arange(K * S, device=chosen.device) < tokens[:, None]  # [B * H, K * S]
    kept = found.view(B * H, K * S)[read]
    slots[: len(kept)] = kept
