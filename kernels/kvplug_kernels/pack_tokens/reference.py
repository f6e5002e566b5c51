"""Plain torch, and what a CPU runs."""

import torch
from torch import Tensor


def pack_tokens(
    cache: Tensor, pages: Tensor, tokens: Tensor, keep: Tensor, targets: Tensor
) -> None:
    S, K = cache.shape[2], tokens.shape[2]
    kept = torch.arange(K, device=cache.device) < keep[:, None, None]  # [J, 1, K]
    j, h, k = kept.expand(tokens.shape).nonzero(as_tuple=True)  # one entry per token copied
    token = tokens[j, h, k].long()
    source, target = pages[j, token // S].long(), targets[j, k // S].long()
    cache[target, h, k % S] = cache[source, h, token % S]
