"""TOVA: keep what the newest token looks at.

    s_j = mean over a KV head's G query heads of softmax_j(q . k_j)

with the query of the last token, which itself stays.

Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, https://arxiv.org/abs/2401.06104

Differs from the paper: a token is dropped at every step there, here what goes is chosen at the
prompt's end and every ``interval`` tokens of the answer. The paper keeps one set of tokens for all
heads of a layer, or one for each head; here one for each KV head, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policies.snapkv import window_attention
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class TOVA(ScoredEviction):
    name = "tova"
    evidence = Evidence.WINDOW_QUERIES
    query_agnostic = False
    paper = "https://arxiv.org/abs/2401.06104"

    sinks: int = 0
    window: int = 1
    interval: int | None = 128

    def score(self, prompt: PromptKV) -> Tensor:
        assert prompt.queries is not None
        return window_attention(prompt.queries[:, -1:], prompt)
