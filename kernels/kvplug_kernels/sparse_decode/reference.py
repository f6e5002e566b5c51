"""Plain fp32 torch, written to be read. Tokens that were not chosen are never gathered."""

import torch
from torch import Tensor


def sparse_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    B, Hq, D = query.shape
    S, H = keys.shape[1:3]
    K = chosen.shape[2]
    tail = (lengths - 1) % S + 1  # [B], tokens of the last page
    tokens = ((counts - 1) * S + tail[:, None]).masked_fill(counts == 0, 0)  # [B, H]
    read = torch.arange(K * S, device=query.device) < tokens[:, :, None]  # [B, H, K*S]

    b, h, t = read.nonzero(as_tuple=True)  # the tokens read, one after the other
    page = page_table[b, chosen[b, h, t // S].long()].long()
    k = torch.zeros(B, H, K * S, D, device=query.device)
    v = torch.zeros(B, H, K * S, D, device=query.device)
    k[b, h, t] = keys[page, t % S, h].float()
    v[b, h, t] = values[page, t % S, h].float()

    q = query.float().view(B, H, Hq // H, D)
    logits = (q @ k.transpose(2, 3) * scale).masked_fill(~read[:, :, None], float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0)  # a row of -inf is an empty request
    return (weights @ v).view(B, Hq, D).to(query.dtype)
