"""Plain torch, and what a CPU runs."""

import torch
from torch import Tensor


def virtual_heads(
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    page_size: int,
    page_stride: int,
    head_stride: int,
    out: tuple[Tensor, Tensor],
) -> None:
    B, H, K = chosen.shape
    named = torch.arange(K, device=chosen.device) < counts[:, :, None]  # [B, H, K]
    logical = chosen.masked_fill(~named, 0).long().view(B, H * K)
    physical = page_table.gather(1, logical).view(B, H, K).long()
    heads = torch.arange(H, device=chosen.device)[:, None]
    virtual = physical * page_stride + heads * head_stride
    out[0].copy_(virtual.masked_fill_(~named, 0).view(B * H, K))
    tail = (lengths - 1) % page_size + 1  # [B], tokens of the last page
    tokens = (counts - 1) * page_size + tail[:, None]
    out[1].copy_(tokens.masked_fill_(counts == 0, 0).view(B * H))
