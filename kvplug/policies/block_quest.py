"""Block-Quest: a block of queries reads the pages whose keys could score highest for their mean.

    u_p = sum_d max(q_d lo_pd, q_d hi_pd)        q: the mean of the block's queries, of one head
    share of a page = softmax(scale u)_p, mean over the query heads that share a KV head

with lo and hi the least and greatest key of a page in each channel, which Quest's digests carry:
it costs no look at any key. Beside ``twilight``, or where a format keeps pages in codes, lo and
the highest code are those bounds.

The bounds are those of Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM
Inference", ICML 2024, https://arxiv.org/abs/2406.10774; what is ours is that a block asks with
them. Bounds are no weights, so ``threshold`` is a rule of thumb here; what a single query of a
block alone looks for is averaged away.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from kvplug.formats import KeyCodes
from kvplug.generate import BlockSelector, QueryBlocks
from kvplug.load import small_page
from kvplug.policies.quest import KeyExtremes
from kvplug.policy import Digest
from kvplug_kernels.block_mean import block_mean
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.shapes import by_page


@dataclass(frozen=True, kw_only=True)
class BlockQuest(BlockSelector):
    name = "block_quest"
    reads = "all; a prompt's blocks budget, plus a digest of two keys per page"
    paper = "https://arxiv.org/abs/2406.10774"

    threshold: float | None = None
    budget: int = 2048

    @property
    def digest(self) -> Digest:
        return KeyExtremes()

    def over(self, codes: KeyCodes) -> BlockSelector:
        if self.mass is not None:
            raise ValueError(
                f"{self}: the page that is being filled has no codes yet, and so no bound to "
                "count for threshold; leave threshold out"
            )
        own = {f.name: getattr(self, f.name) for f in fields(BlockQuest) if f.init}
        return BlockQuestOverCodes(**own, codes=codes)

    def page(self, block_size: int) -> int:
        return small_page(block_size)

    def bounds(self, query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor) -> Tensor:
        """As ``page_bound``, by pages [B] of the table."""
        return page_bound(query, digest, page_table, pages * by_page(digest).shape[1])

    def score(
        self,
        blocks: QueryBlocks,
        keys: Tensor | None,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
    ) -> Tensor:
        assert digest is not None
        n, (_, H, G, D), parts = len(pages), blocks.query.shape, by_page(digest).shape[1]
        mean = block_mean(blocks.query.flatten(1, 2), blocks.bounds).view(n, H, G, D)
        mean = mean.to(blocks.query.dtype if digest.dtype in FP8 else digest.dtype)
        # Each query head asks for itself: n * G requests of H heads.
        asked = mean.transpose(1, 2).reshape(n * G, H, D)
        table, seen = (each.repeat_interleave(G, 0) for each in (page_table, pages))
        bounds = self.bounds(asked, digest, table, seen)
        bounds = bounds.view(n, G, H, -1, parts).amax(-1)
        return (bounds * blocks.scale).softmax(-1).mean(1)


@dataclass(frozen=True, kw_only=True)
class BlockQuestOverCodes(BlockQuest):
    """By codes, which a block's last page may not have yet: it is read in any case."""

    codes: KeyCodes = field(repr=False)

    @property
    def digest(self) -> Digest:
        return self.codes

    def bounds(self, query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor) -> Tensor:
        """-inf for the last page too, but 0 where it is the only one."""
        full, parts = (pages - 1).clamp(min=0), by_page(digest).shape[1]
        levels = 2**self.codes.bits - 1
        bounds = page_bound(query, digest[..., :2, :], page_table, full * parts, levels)
        first = torch.arange(bounds.shape[2], device=bounds.device) == 0
        return bounds.masked_fill(first & (full == 0)[:, None, None], 0.0)
