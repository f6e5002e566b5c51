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
    unit: int | None = None,
    token_stride: int = 0,
) -> None:
    (B, H, K), unit = chosen.shape, unit or page_size
    named = torch.arange(K, device=chosen.device) < counts[:, :, None]  # [B, H, K]
    token = chosen.masked_fill(~named, 0).long() * unit  # [B, H, K], of each unit the first
    physical = page_table.gather(1, (token // page_size).view(B, H * K)).view(B, H, K).long()
    heads = torch.arange(H, device=chosen.device)[:, None]
    virtual = physical * page_stride + heads * head_stride + token % page_size * token_stride
    out[0].copy_(virtual.masked_fill_(~named, 0).view(B * H, K))
    tail = (lengths - 1) % unit + 1  # [B], tokens of the last unit
    tokens = (counts - 1) * unit + tail[:, None]
    out[1].copy_(tokens.masked_fill_(counts == 0, 0).view(B * H))
