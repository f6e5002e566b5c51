"""KVzip: keep what a model looks at as it repeats the context.

    s_j = max over the queries i of the repetition, and the G query heads, of softmax_j(q_i . k_j)

for the keys of one chunk of the context; softmax runs over those, the context's first ``sinks``
tokens and what the repetition has so far. No question is asked, so what is kept serves all: a
request for each chunk repeats it, once for everyone (``kvplug compile``). Keys and values are
those of the whole context; it is kept by chunks, and read so by whoever comes with it.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", NeurIPS 2025,
https://arxiv.org/abs/2505.23416

Differs from the paper: each KV head of a layer keeps as much of each chunk, where the paper shares
one budget among all heads of all layers; a chunk is repeated right behind itself, with nothing in
between that asks for it, so that what is kept follows from the context's tokens alone, and scored
where no later chunk has been read; chunks are of 512 tokens, the paper's of 2,048.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policies.snapkv import LOWEST
from kvplug.policy import Evidence

BLOCK = 1 << 24  # logits that are in memory at once


@dataclass(frozen=True, kw_only=True)
class KVzip(ScoredEviction):
    name = "kvzip"
    evidence = Evidence.REPETITION
    query_agnostic = True
    memory = "budget of what was compiled, all else"
    reads = "budget of what was compiled, all else"
    paper = "https://arxiv.org/abs/2505.23416"

    budget: int | float = 0.25
    chunk: int | None = 512

    def __post_init__(self) -> None:
        if not isinstance(self.budget, float) or self.chunk is None or self.interval is not None:
            raise ValueError(
                f"kvzip: budget must be a share of each chunk of a context, above 0 and below 1, "
                f"and interval None, got budget={self.budget!r}, chunk={self.chunk!r}, "
                f"interval={self.interval!r}; write kvzip(budget=0.25, chunk=512)"
            )
        super().__post_init__()

    def score(self, prompt: PromptKV) -> Tensor:
        assert prompt.queries is not None and prompt.repeated is not None
        B, W, H, G, _ = prompt.queries.shape
        first = prompt.keys[:, :0] if prompt.first is None else prompt.first
        begin, T = first.shape[1], prompt.keys.shape[1]
        keys = torch.cat([first, prompt.keys, prompt.repeated], 1).float()  # [B, n, H, D]
        keys = keys.permute(0, 2, 3, 1).flatten(0, 1)  # [B * H, D, n]
        asked = (prompt.queries.float() * prompt.scale).permute(0, 2, 1, 3, 4).flatten(0, 1)
        position = torch.arange(keys.shape[2], device=keys.device)
        best = keys.new_zeros(B * H, T)
        rows = max(1, BLOCK // (B * H * G * keys.shape[2]))
        for row in range(0, W, rows):
            queries = asked[:, row : row + rows]  # [B * H, w, G, D]
            last = begin + T + row + torch.arange(queries.shape[1], device=keys.device)
            logits = (queries.flatten(1, 2) @ keys).unflatten(1, (-1, G))
            logits = logits.masked_fill(position > last[:, None, None], LOWEST)
            shares = logits.softmax(3)[..., begin : begin + T]
            best = best.maximum(shares.amax((1, 2)))
        return best.view(B, H, T)
