"""FlexPrefill: each KV head of a prompt finds out whether its blocks look for something, and reads
by pooled keys or by columns and diagonals, until ``threshold`` of the attention is covered.

    a = mean_q softmax(scale q . k), by page    b = softmax(scale mean(q) . mean(k in the page))
    sqrt(JSD(a, b)) < tau:   a block's pages by softmax(scale mean(q in the block) . mean(k))
    else:                    the fewest columns, and the fewest diagonals, that hold threshold
    and in either case the min_budget tokens of the best pages      q: the last 64 queries

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
Inference", ICLR 2025, https://arxiv.org/abs/2502.20766

Differs from the paper: query heads that share a KV head read the same pages (mean over the group);
each block covers threshold for itself, where the paper sorts the pages of all rows together;
columns and diagonals are counted as tokens; and where a prompt comes in chunks, each asks its own
last queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplug.generate import BlockSelector, QueryBlocks
from kvplug.policies.minference import WANTED, Seen, shares


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(BlockSelector):
    name = "flexprefill"
    reads = "all; a prompt's blocks what covers threshold of the attention of its last queries"
    paper = "https://arxiv.org/abs/2502.20766"
    needs_keys: ClassVar[bool] = True
    asks: ClassVar[int] = 64

    tau: float = 0.1
    """Of the distance below which pooled keys say enough."""
    min_budget: int = 1024
    """Tokens read in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None:
            raise ValueError(
                "flexprefill: threshold says what is read; write flexprefill(threshold=0.9), or "
                "minference, which reads numbers of columns and diagonals"
            )
        tau, least = self.tau, self.min_budget
        numeric = isinstance(tau, (int, float)) and not isinstance(tau, bool)
        if not (numeric and 0 <= tau <= 1):
            raise ValueError(
                f"flexprefill: tau must be a distance between 0 and 1, got {tau!r}; write "
                "flexprefill(tau=0.1)"
            )
        whole = isinstance(least, int) and not isinstance(least, bool)
        if not whole or not 0 <= least <= self.budget:
            raise ValueError(
                "flexprefill: min_budget must be a number of tokens, at most "
                f"budget={self.budget}, got {least!r}; write flexprefill(min_budget=1024)"
            )

    @property
    def mass(self) -> float:
        return WANTED

    def score(
        self,
        blocks: QueryBlocks,
        keys: Tensor | None,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
    ) -> Tensor:
        assert keys is not None and blocks.last is not None and self.threshold is not None
        seen, last, threshold = Seen(blocks, keys, page_table, pages), blocks.last, self.threshold
        chosen = covering(seen.columns, threshold), covering(seen.diagonals, threshold)
        asked, by_page = seen.pooled(blocks), seen.by_page(seen.columns)
        looks = distance(by_page, self._estimate(blocks, seen)) < self.tau
        wanted = seen.touched(*chosen)
        wanted = covering(asked, threshold).where(looks[last.run][..., None], wanted)
        weight = asked.where(looks[last.run][..., None], by_page[last.run])
        weight = weight.where(seen.page < pages[:, None, None], 0)
        least = -(-self.min_budget // seen.size)
        rank = weight.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        wanted |= (rank < least) & (seen.page < pages[:, None, None])
        return shares(wanted, weight)

    def _estimate(self, blocks: QueryBlocks, seen: Seen) -> Tensor:
        """b of each prompt. [R, H, P]"""
        last = blocks.last
        assert last is not None
        W = last.query.shape[1]
        there = torch.arange(W, device=last.count.device) >= W - last.count[:, None]
        query = last.query.float() * there[..., None, None, None]
        mean = query.sum(1) / last.count[:, None, None, None]
        logits = torch.einsum("rhgd,rphd->rhgp", mean, seen.means) * blocks.scale
        seen_pages = seen.pages[last.block][:, None, None, None]
        return logits.where(seen.page < seen_pages, -torch.inf).softmax(-1).mean(2)


def covering(sums: Tensor, threshold: float) -> Tensor:
    """The fewest, of the greatest sums, that hold the threshold of all. [..., T] -> bool"""
    ordered, index = sums.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    wanted = before < threshold * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(wanted).scatter_(-1, index, wanted & (ordered > 0))


def distance(sums: Tensor, estimate: Tensor) -> Tensor:
    """sqrt of the Jensen-Shannon divergence, in nats, of shares. [R, H, P] each -> [R, H]"""
    given = sums / sums.sum(-1, keepdim=True).clamp(min=1e-9)
    middle = ((given + estimate) / 2).clamp(min=1e-30)

    def from_middle(shares: Tensor) -> Tensor:
        return torch.special.xlogy(shares, shares / middle).sum(-1)

    return ((from_middle(given) + from_middle(estimate)) / 2).clamp(min=0).sqrt()
