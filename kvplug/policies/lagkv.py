"""LagKV: keep the tokens that fit least into the range of those that follow.

Behind the sinks lie partitions of ``lag`` tokens. Each channel d of the keys of one is measured by
its least and greatest number in the next,

    u_jd = (k_jd - min_d) / (max_d - min_d),   a_j = softmax_j(std_d(u_jd))

with softmax over the partition; b_j is the same of the values, and

    s_j = (tokens of j's partition with a smaller a + b) / lag

so that each partition keeps about as many. The last whole partition and what lies behind it have
nothing to be measured by and stay, 2 ``lag`` - 1 tokens at most: a budget of hardly more is a
window, and one of less keeps the newest of them.

Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
2025, https://arxiv.org/abs/2504.04704

Differs from the paper: a partition is compressed there once, when the next is whole, to a share of
it; here all are at the prompt's end, to one budget, the odd tokens to the oldest partitions, and
with an ``interval`` those that stayed are compared anew. A channel in which the next partition
has one number alone counts as 0, where the authors' code divides by 0. ``lag`` and ``sinks`` are
kvpress's, the authors' code has 1024 and 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class LagKV(ScoredEviction):
    name = "lagkv"
    evidence = Evidence.KEYS_AND_VALUES
    query_agnostic = True
    paper = "https://arxiv.org/abs/2504.04704"

    lag: int = 128
    """Tokens of a partition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lag, bool) or not isinstance(self.lag, int) or self.lag < 2:
            raise ValueError(
                f"lagkv: lag must be a number of tokens, at least 2, got {self.lag!r}; write "
                "lagkv(lag=128)"
            )

    def score(self, prompt: PromptKV) -> Tensor:
        B, T, H, _ = prompt.keys.shape
        position = torch.arange(T, device=prompt.keys.device)
        newest = (position + 1).float().expand(B, H, T)  # above every rank
        scored = max((T - self.sinks) // self.lag - 1, 0)
        if not scored:
            return newest
        alien = self._alien(prompt.keys, scored) + self._alien(prompt.values, scored)
        falling = alien.argsort(dim=3, descending=True, stable=True)
        rank = (self.lag - 1 - falling.argsort(3)).float() / self.lag
        rank = pad(rank.flatten(2), (self.sinks, T - self.sinks - scored * self.lag))
        whole = (prompt.lengths[:, None] - self.sinks) // self.lag  # partitions
        part = (position - self.sinks) // self.lag
        measured = (part >= 0) & (part < whole - 1)
        return torch.where(measured[:, None], rank, newest)

    def _alien(self, states: Tensor, scored: int) -> Tensor:
        """a of the first partitions. [B, T, H, D] -> [B, H, scored, lag] fp32"""
        last = self.sinks + (scored + 1) * self.lag
        parts = states[:, self.sinks : last].float().unflatten(1, (scored + 1, self.lag))
        least, most = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
        share = (parts[:, :-1] - least).div_(most - least).masked_fill_(most == least, 0)
        return share.std(4).softmax(2).permute(0, 3, 1, 2)
