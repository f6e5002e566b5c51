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
    unit: int,
    strides: tuple[int, int],
) -> None:
    """strides: of page_table's pages in slots, and of their tokens."""
    if chosen is None or counts is None:
        chosen = torch.arange(page_table.shape[1], device=page_table.device)[None, None]
        counts = ((lengths + unit - 1) // unit)[:, None]
        chosen = chosen.expand(len(counts), -1, -1)
    (B, H, K), S, U = chosen.shape, page_size, unit
    page_stride, token_stride = strides
    named = torch.arange(K, device=chosen.device) < counts[:, :, None]  # [B, H, K]
    logical = chosen.masked_fill(~named, 0).long().reshape(B, H * K)
    page = page_table.gather(1, logical * U // S).view(B, H, K, 1).long()
    begin = (logical * U % S).view(B, H, K, 1)  # in its page
    head = torch.arange(H, device=chosen.device)[:, None, None]
    token = begin + torch.arange(U, device=chosen.device)
    found = page * page_stride + token * token_stride + head  # [B, H, K, U]
    tail = (lengths - 1) % U + 1  # [B], tokens of the last unit
    tokens = ((counts - 1) * U + tail[:, None]).masked_fill(counts == 0, 0).view(B * H)
    bounds[0] = 0
    bounds[1:] = tokens.cumsum(0)
    read = torch.arange(K * U, device=chosen.device) < tokens[:, None]  # [B * H, K * U]
    kept = found.view(B * H, K * U)[read]
    slots[: len(kept)] = kept
