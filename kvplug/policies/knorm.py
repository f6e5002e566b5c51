"""KNorm: keep the keys of smallest norm, which attract the most attention.

    s_j = -||k_j||

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
EMNLP 2024, https://arxiv.org/abs/2406.11430

Differs from the paper: every layer is compressed (the authors leave the first two whole), and the
first ``sinks`` tokens always stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class KNorm(ScoredEviction):
    name = "knorm"
    evidence = Evidence.KEYS
    query_agnostic = True
    paper = "https://arxiv.org/abs/2406.11430"

    def score(self, prompt: PromptKV) -> Tensor:
        return -torch.linalg.vector_norm(prompt.keys, dim=3, dtype=torch.float32).transpose(1, 2)
