"""Plain torch, and what a CPU runs."""

from itertools import pairwise

import torch
from torch import Tensor


def block_mean(query: Tensor, bounds: Tensor) -> Tensor:
    rows = bounds.tolist()
    out = query.new_zeros(len(rows) - 1, *query.shape[1:], dtype=torch.float32)
    for mean, (begin, end) in zip(out, pairwise(rows), strict=True):
        if begin < end:
            torch.mean(query[begin:end], 0, dtype=torch.float32, out=mean)
    return out
