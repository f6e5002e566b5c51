"""SnapKV: keep what the prompt's last tokens look at, and its neighbours.

    a_j = mean over the last W queries i, and over the G query heads, of softmax_j(q_i . k_j)
    s_j = mean of a over the ``pool`` positions around j

for the keys before the window; softmax runs over all that a query sees, the pool takes the
window's own columns for 0. The window always stays.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024,
https://arxiv.org/abs/2404.14469

Differs from the paper: query heads that share a KV head keep the same tokens (mean over the
group; the authors' code repeats the keys and keeps a set for each query head), in fp32 throughout.
Defaults are those of the authors' code. To protect a prompt's first tokens too (``sinks=51`` of
512) changes nothing of text, finds no more of exact recall, and saves .25 nats of needles whose
question comes later (docs/evidence.md, "Answers").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policy import Evidence

BLOCK = 8192  # keys whose logits are in memory at once
LOWEST = torch.finfo(torch.float32).min  # finite: minus infinity alone has no softmax


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoredEviction):
    name = "snapkv"
    evidence = Evidence.WINDOW_QUERIES
    query_agnostic = False
    paper = "https://arxiv.org/abs/2404.14469"

    sinks: int = 0
    window: int = 64
    pool: int = 5
    """Positions that a score is averaged over, an odd number; 1 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.pool, bool)
            or not isinstance(self.pool, int)
            or self.pool < 1
            or self.pool % 2 == 0
            or self.pool >= 1 << 31  # torch's own limit
        ):
            raise ValueError(
                f"snapkv: pool must be an odd number of tokens below 2 ** 31, got {self.pool!r}; "
                "write snapkv(pool=5)"
            )

    def score(self, prompt: PromptKV) -> Tensor:
        assert prompt.queries is not None
        assert prompt.queries.shape[1] == self.window
        attention = window_attention(prompt.queries, prompt)
        before = torch.arange(attention.shape[2], device=attention.device)
        before = before < prompt.lengths[:, None, None] - self.window
        return avg_pool1d(attention * before, self.pool, stride=1, padding=self.pool // 2)


def window_attention(queries: Tensor, prompt: PromptKV) -> Tensor:
    """What each key gets of the window's queries [B, W, H, G, D], their mean. -> [B, H, T] fp32"""
    B, W, H, G, _ = queries.shape
    T, device = prompt.keys.shape[1], prompt.keys.device
    asked = queries.float() * prompt.scale
    asked = asked.permute(0, 2, 3, 1, 4).reshape(B * H, G * W, -1)
    last = prompt.lengths[:, None] - torch.arange(W, 0, -1, device=device)  # [B, W]

    def logits(first: int) -> Tensor:
        keys = prompt.keys[:, first : first + BLOCK].float().transpose(1, 2).flatten(0, 1)
        unseen = torch.arange(first, first + keys.shape[1], device=device) > last[:, :, None]
        dots = torch.bmm(asked, keys.mT).view(B, H, G, W, -1)
        return dots.masked_fill_(unseen[:, None, None], LOWEST)  # garbage is never seen

    # Rows of no token have a softmax too: they count for nothing.
    rows = (last >= 0).float()[:, None, None].expand(B, H, G, W).reshape(B * H, 1, G * W)

    def mass(shares: Tensor) -> Tensor:
        return torch.bmm(rows, shares.view(B * H, G * W, -1)).view(B, H, -1)

    if T <= BLOCK:
        seen = mass(logits(0).softmax(4))
    else:
        blocks = range(0, T, BLOCK)
        total = logits(0).logsumexp(4, keepdim=True)
        for first in blocks[1:]:
            total = total.logaddexp(logits(first).logsumexp(4, keepdim=True))
        seen = torch.cat([mass((logits(first) - total).exp_()) for first in blocks], 2)
    return seen / (G * prompt.lengths.clamp(1, W)[:, None, None])
