"""ChunkKV: keep whole chunks of neighbouring tokens, by what a wrapped policy says of each token.

    s_j = mean of the wrapped score over the chunk of ``length`` tokens in which j lies

the first chunk beginning at the first token. Tokens of the wrapped policy's window, which stay in
any case, are not counted. Where the budget has no room for another chunk, its first tokens stay.

Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM
Inference", NeurIPS 2025, https://arxiv.org/abs/2502.00299

Differs from the paper: each KV head keeps its own chunks, so that tensor-parallel ranks need not
talk, where the paper has one set for all heads of a layer; every layer is scored, none takes
another's chunks; any score may be wrapped, the paper's is the window's attention, as ``snapkv``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvplug.compress import PromptKV, ScoredEviction, WrappedScore
from kvplug.policies.snapkv import SnapKV
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class ChunkKV(WrappedScore):
    name = "chunkkv"
    evidence = Evidence.WINDOW_QUERIES
    query_agnostic = False
    paper = "https://arxiv.org/abs/2502.00299"
    example = "chunkkv(snapkv(budget=1024))"

    base: ScoredEviction = field(default_factory=SnapKV)
    """Whose budget, sinks, window, interval and chunk these are too, as what it looks at."""
    length: int = 10
    """Tokens of a chunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(
                f"chunkkv: length must be a number of tokens, at least 1, got {self.length!r}; "
                "write chunkkv(snapkv(budget=1024), length=10)"
            )

    def without_sinks(self) -> ChunkKV:
        return replace(self, base=self.base.without_sinks())

    def score(self, prompt: PromptKV) -> Tensor:
        score = self.base.score(prompt)
        T = score.shape[2]
        length = min(self.length, T)
        position = torch.arange(T, device=score.device)
        counted = (position < prompt.lengths[:, None] - self.window)[:, None].expand_as(score)
        total, count = (
            pad(each, (0, -T % length)).unflatten(2, (-1, length)).sum(3, keepdim=True)
            for each in (score.masked_fill(~counted, 0), counted.float())
        )
        return (total / count.clamp_min(1)).expand(-1, -1, -1, length).flatten(2)[:, :, :T]
