"""Random prefill: a block of queries reads pages drawn by lot, each KV head its own. The baseline
of every other estimate.

    share of page p = hash(seed, head, block, p) / sum of them over the pages

The lot falls by position alone, so that it is the same in every batch and however the prompt was
chunked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug.generate import BlockSelector, QueryBlocks
from kvplug.policies.random import mix
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class RandomPrefill(BlockSelector):
    name = "random_prefill"
    evidence = Evidence.NONE
    query_agnostic = True
    reads = "all; a prompt's blocks budget"
    paper = ""

    threshold: float | None = None
    budget: int = 2048
    seed: int = 0
    """Which lots are drawn; below 2 ** 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seed = self.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
            raise ValueError(
                "random_prefill: seed must be a whole number of at least 0 and below 2 ** 32, got "
                f"{seed!r}; write random_prefill(seed=0)"
            )

    def score(
        self,
        blocks: QueryBlocks,
        keys: Tensor | None,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
    ) -> Tensor:
        device = pages.device
        block = blocks.start.long() // blocks.size
        head = torch.arange(blocks.query.shape[1], device=device)
        page = torch.arange(page_table.shape[1], device=device)
        drawn = mix(mix(mix(self.seed) ^ block)[:, None] ^ head)  # [n, H]
        lots = (mix(drawn[..., None] ^ page) >> 8).float() + 1
        lots *= page < pages[:, None, None]
        return lots / lots.sum(-1, keepdim=True).clamp(min=1)
