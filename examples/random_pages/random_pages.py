"""Random pages: read any pages. What a selector has to beat at the same bytes.

    s_p = hash(seed, head, p)

The baseline's point is made in https://arxiv.org/abs/2609.03430 (for eviction while decoding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug import Evidence, Selector


@dataclass(frozen=True, kw_only=True)
class RandomPages(Selector):
    name = "random_pages"
    evidence = Evidence.NONE
    reads = "budget"
    paper = "https://arxiv.org/abs/2609.03430"

    seed: int = 0

    def score(
        self,
        query: Tensor,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
        page_size: int,
    ) -> Tensor:
        heads = torch.arange(query.shape[1], device=query.device)[None, :, None]
        page = torch.arange(page_table.shape[1], device=query.device)[None, None]
        noise = (
            (page + 1) * 2654435761 + (heads + 1) * 2246822519 + self.seed * 3266489917
        ) % 65521
        return noise.float().masked_fill(page >= pages[:, None, None], -torch.inf)
