"""VaSE: keep the largest values, and of the other tokens those drawn by lot.

    s_j = 2                    where ||v_j|| is among the ``reserve`` * budget largest
          hash(seed, head, j)  else, uniform in [0, 1)

A few values are far longer than the others, and a model that loses them goes in circles; beyond
those, what is kept at random is more diverse than what any score ranks first.

Chang et al., "Value-Aware Stochastic KV Cache Eviction for Reasoning Models", 2026,
https://arxiv.org/abs/2606.03928

Differs from the paper: the lots are even, where its two variants weigh them by attention and by
keys, so that ``random`` beside it shows what the reserve alone is worth. The paper packs answers,
``interval=128`` here, and keeps the prompt, which ``protect`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from kvplug.compress import PromptKV
from kvplug.policies.random import Random
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class VaSE(Random):
    name = "vase"
    evidence = Evidence.KEYS_AND_VALUES
    paper = "https://arxiv.org/abs/2606.03928"

    reserve: float = 0.1
    """Share of the budget that the largest values take, as far as sinks and window leave it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reserve, bool) or not (
            isinstance(self.reserve, (int, float)) and 0 < self.reserve <= 1
        ):
            raise ValueError(
                f"vase: reserve must be a share of the budget, above 0 and at most 1, got "
                f"{self.reserve!r}; write vase(reserve=0.1), or random for 0"
            )

    def score(self, prompt: PromptKV) -> Tensor:
        lots = super().score(prompt)
        norms = torch.linalg.vector_norm(prompt.values, dim=3, dtype=torch.float32)
        norms = norms.masked_fill(~prompt.valid[:, :, None], -1).transpose(1, 2)
        largest = norms.topk(min(self.reserved, norms.shape[2]), dim=2).indices
        return lots.scatter(2, largest, 2.0)

    @property
    def reserved(self) -> int:
        """Tokens."""
        kept = self.budget * self.chunk if self.appends and self.chunk else self.budget
        return ceil(self.reserve * kept)
