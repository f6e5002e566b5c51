"""KeyDiff: keep the keys that point away from where most keys point.

    s_j = -cos(k_j, a),   a = mean_i k_i / ||k_i||

Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments", 2025, https://arxiv.org/abs/2504.15364

Differs from the paper: the prompt is scored once, when all of it is there; the paper evicts block
by block as it is read. The first ``sinks`` tokens always stay. On long answers (``interval``) it
loses more than ``random``. At a quarter of a prompt it loses less with the first and last tenth of
the budget protected (``sinks=51, window=51`` of 512): .10 nats of SmolLM2's text, .45 of needles
(docs/evidence.md, "Answers").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, einsum
from torch.nn.functional import normalize

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class KeyDiff(ScoredEviction):
    name = "keydiff"
    evidence = Evidence.KEYS
    query_agnostic = True
    paper = "https://arxiv.org/abs/2504.15364"

    def score(self, prompt: PromptKV) -> Tensor:
        directions = normalize(prompt.keys.float(), dim=3)
        directions = directions.masked_fill(~prompt.valid[:, :, None, None], 0)
        anchor = normalize(directions.sum(1), dim=2)  # [B, H, D]; its length does not matter
        return -einsum("bthd,bhd->bht", directions, anchor)
