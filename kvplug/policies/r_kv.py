"""R-KV: keep what the last tokens look at, and drop what says again what a later token says.

    a_j = mean over the last W queries i of softmax_j(max over the G query heads of q_i . k_j)
    I_j = max of a over the ``pool`` positions around j
    c_ij = cos(k_i, k_j), 0 for i = j and for the last j that is more than half like i
    R_j = softmax_j(mean_i c_ij)
    s_j = ``attention`` I_j - (1 - ``attention``) R_j

for the keys before the window, which always stays. R counts all keys.

Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", 2025,
https://arxiv.org/abs/2505.24133

Defaults are the paper's: it drops what exceeds its budget every 128 tokens. Differs: prompts are
packed at their end too; all in fp32; a key that is like no other is spared nothing, where the
authors' code spares the first token's likeness to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policies.snapkv import LOWEST
from kvplug.policy import Evidence

BLOCK = 1 << 22  # likenesses of a head that are in memory at once
ALIKE = 0.5


@dataclass(frozen=True, kw_only=True)
class RKV(ScoredEviction):
    name = "r_kv"
    evidence = Evidence.WINDOW_QUERIES
    query_agnostic = False
    paper = "https://arxiv.org/abs/2505.24133"

    sinks: int = 0
    window: int = 8
    interval: int | None = 128
    attention: float = 0.1
    """Weight of what the window looks at; the rest is that of redundancy."""
    pool: int = 7
    """Positions that the attention is the greatest of, an odd number; 1 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.attention, bool) or not (
            isinstance(self.attention, (int, float)) and 0 <= self.attention <= 1
        ):
            raise ValueError(
                f"r_kv: attention must be a weight between 0 and 1, got {self.attention!r}; write "
                "r_kv(attention=0.1)"
            )
        whole = isinstance(self.pool, int) and not isinstance(self.pool, bool)
        if not (whole and 1 <= self.pool < 1 << 31 and self.pool % 2):
            raise ValueError(
                f"r_kv: pool must be an odd number of tokens below 2 ** 31, got {self.pool!r}; "
                "write r_kv(pool=7)"
            )

    def score(self, prompt: PromptKV) -> Tensor:
        looked_at = max_pool1d(_attention(prompt), self.pool, stride=1, padding=self.pool // 2)
        return self.attention * looked_at - (1 - self.attention) * redundancy(prompt)


def _attention(prompt: PromptKV) -> Tensor:
    """a of the keys before the window, 0 of others. -> [B, H, T] fp32"""
    assert prompt.queries is not None
    (B, W, H, G, _), T = prompt.queries.shape, prompt.keys.shape[1]
    asked = (prompt.queries.float() * prompt.scale).permute(0, 2, 3, 1, 4)  # [B, H, G, W, D]
    keys = prompt.keys.float().transpose(1, 2)  # [B, H, T, D]
    logits = torch.bmm(asked.reshape(B * H, G * W, -1), keys.flatten(0, 1).mT)
    before = torch.arange(T, device=keys.device) < prompt.lengths[:, None] - W  # [B, T]
    logits = logits.view(B, H, G, W, T).masked_fill(~before[:, None, None, None], LOWEST)
    seen = logits.amax(2).softmax(3)
    # A prompt shorter than the window has nothing before it: garbage rows count for nothing.
    return seen.mean(2).masked_fill(~before[:, None], 0)


def redundancy(prompt: PromptKV) -> Tensor:
    """R. -> [B, H, T] fp32"""
    B, T, H, _ = prompt.keys.shape
    valid = prompt.valid
    directions = normalize(prompt.keys.float(), dim=3).masked_fill(~valid[:, :, None, None], 0)
    directions = directions.transpose(1, 2)  # [B, H, T, D]
    position = torch.arange(T, device=directions.device)
    total = directions.new_zeros(B, H, T)
    rows = max(1, BLOCK // T)
    for first in range(0, T, rows):
        like = directions[:, :, first : first + rows] @ directions.mT  # [B, H, rows, T]
        own = position[first : first + rows, None]
        like = like.masked_fill(position == own, 0)
        last = torch.where(like > ALIKE, position, -1).amax(3, keepdim=True)
        total += like.masked_fill(position == last, 0).sum(2)
    mean = total / prompt.lengths[:, None, None]
    return mean.masked_fill(~valid[:, None], float("-inf")).softmax(2)
