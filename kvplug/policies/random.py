"""Random: keep tokens drawn by lot, each KV head its own. The baseline of every other score.

    s_j = hash(seed, head, j)

uniform in [0, 1). A method that does not beat it at equal bytes is not worth its cost: it is
reported to match the strongest decode evictor on six reasoning tasks
(https://arxiv.org/abs/2609.03430).

The lot falls by position and by the head's global index alone, so that it is the same in every
batch, however the prompt was chunked, and on however many tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policy import Evidence

Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class Random(ScoredEviction):
    name = "random"
    evidence = Evidence.NONE
    query_agnostic = True
    paper = "https://arxiv.org/abs/2609.03430"

    seed: int = 0
    """Which lots are drawn; below 2 ** 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.seed, bool)
            or not isinstance(self.seed, int)
            or not 0 <= self.seed < 1 << 32
        ):
            raise ValueError(
                "random: seed must be a whole number of at least 0 and below 2 ** 32, got "
                f"{self.seed!r}; write random(seed=0)"
            )

    def score(self, prompt: PromptKV) -> Tensor:
        B, T, H, _ = prompt.keys.shape
        heads = torch.arange(H, device=prompt.keys.device) + prompt.first_head
        positions = torch.arange(T, device=prompt.keys.device)
        seed = mix(self.seed)
        if prompt.event:  # the lots of an event's tokens are drawn anew
            seed = mix(seed ^ prompt.event)
        lots = mix(mix(seed ^ heads)[:, None] ^ positions)
        return (lots >> 8).float().mul(2.0**-24).expand(B, H, T)  # 24 bits: as many as fp32 holds


def mix(x: Number) -> Number:
    """A bijection of 32 bits, held in 64 so that no product overflows.

    lowbias32 of Wellons, "Prospecting for Hash Functions", https://nullprogram.com/blog/2018/07/31/
    """
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * (0x846CA68B - (1 << 32)) & 0xFFFFFFFF  # negative: the same low 32 bits
    return x ^ x >> 16
