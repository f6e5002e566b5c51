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
    unit: int | None = None,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    B, Hq, D = query.shape
    S, H = keys.shape[1:3]
    K, U = chosen.shape[2], unit or S
    tail = (lengths - 1) % U + 1  # [B], tokens of the last unit
    tokens = ((counts - 1) * U + tail[:, None]).masked_fill(counts == 0, 0)  # [B, H]
    read = torch.arange(K * U, device=query.device) < tokens[:, :, None]  # [B, H, K*U]

    b, h, t = read.nonzero(as_tuple=True)  # the tokens read, one after the other
    token = chosen[b, h, t // U].long() * U + t % U
    page = page_table[b, token // S].long()
    k = torch.zeros(B, H, K * U, D, device=query.device)
    v = torch.zeros(B, H, K * U, D, device=query.device)
    k[b, h, t] = keys[page, token % S, h].float()
    v[b, h, t] = values[page, token % S, h].float()

    q = query.float().view(B, H, Hq // H, D)
    logits = q @ k.transpose(2, 3) * scale
    if cap:
        logits = cap * (logits / cap).tanh()
    logits = logits.masked_fill(~read[:, :, None], float("-inf"))
    if sinks is not None:
        beside = sinks.float().view(H, Hq // H, 1).expand(B, -1, -1, 1)
        logits = torch.cat([logits, beside], 3)
    weights = logits.softmax(-1)[..., : K * U].nan_to_num(0.0)  # a row of -inf is an empty request
    return (weights @ v).view(B, Hq, D).to(query.dtype)
