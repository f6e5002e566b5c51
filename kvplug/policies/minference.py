"""MInference's vertical-slash pattern: a prompt's blocks read the columns and diagonals that its
last queries weigh most.

    p = softmax(scale q . k) of the last 64 queries, causal
    columns: the ``vertical`` tokens t of greatest sum_q p_qt, the first 30 among them
    diagonals: the ``slash`` distances d of greatest sum_q p_q,q-d, the last 100 among them
    query i reads t  iff  t is such a column or i - t such a distance, whole pages

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention", NeurIPS 2024, https://arxiv.org/abs/2407.02490

Differs from the paper: all heads have this pattern (there a search offline gives each head one of
three); query heads that share a KV head read the same pages (mean over the group); where a prompt
comes in chunks, each asks its own last queries; and of more than ``budget`` tokens the pages that
those queries weigh most are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplug.generate import BlockSelector, QueryBlocks
from kvplug_kernels.fp8 import bits

FIRST, NEAREST = 30, 100
"""Columns and diagonals that are always read."""
WANTED = 0.9999
"""Share of the estimate that what is wanted holds: a page of 10,000 aside, all of it."""


@dataclass(frozen=True, kw_only=True)
class MInference(BlockSelector):
    name = "minference"
    reads = "all; a prompt's blocks the columns and diagonals that its last queries weigh most"
    paper = "https://arxiv.org/abs/2407.02490"
    needs_keys: ClassVar[bool] = True
    asks: ClassVar[int] = 64

    threshold: None = None
    vertical: int = 1000
    """Columns."""
    slash: int = 6096
    """Diagonals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("vertical", FIRST), ("slash", NEAREST)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"minference: {field} must be a number of tokens, at least {least}, which are "
                    f"always read, got {value!r}; write minference(vertical=1000, slash=6096)"
                )
        if self.threshold is not None:
            raise ValueError(
                "minference reads numbers of columns and diagonals, not a share: leave threshold "
                "out, or write flexprefill(threshold=0.9)"
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
        assert keys is not None and blocks.last is not None
        seen = Seen(blocks, keys, page_table, pages)
        wanted = seen.touched(
            most(seen.columns, self.vertical, FIRST), most(seen.diagonals, self.slash, NEAREST)
        )
        return shares(wanted, seen.by_page(seen.columns)[blocks.last.run])


class Seen:
    """What the last queries of R prompts see: T tokens in P pages, as their last blocks do."""

    def __init__(
        self, blocks: QueryBlocks, keys: Tensor, page_table: Tensor, pages: Tensor
    ) -> None:
        """One prompt and KV head after the other, which bounds what this takes at once."""
        assert blocks.last is not None
        last, self.blocks, self.pages, self.size = blocks.last, blocks, pages, keys.shape[1]
        (R, W, H, _, D), P = last.query.shape, page_table.shape[1]
        self.page = torch.arange(P, device=pages.device)
        self.token = torch.arange(P * self.size, device=pages.device)
        self.stop = blocks.start + blocks.bounds.diff()
        self.valid = self.token < self.stop[last.block, None]  # [R, T]
        known = self.page < pages[last.block, None]
        table = page_table[last.block].where(known, page_table[last.block, :1]).long()
        counted = self.valid.unflatten(1, (P, -1)).sum(-1).clamp(min=1)
        shape = R, H, len(self.token)
        self.columns, self.diagonals = (last.query.new_zeros(shape).float() for _ in range(2))
        """Sums of the last queries' attention, mean over the group: of each token, and of each
        distance behind a query. [R, H, T]"""
        self.means = last.query.new_zeros(R, P, H, D).float()
        """Mean key of each page. [R, P, H, D]"""
        for r, row in enumerate(table):
            at = last.seen[r] - W + torch.arange(W, device=pages.device)
            there = at >= last.seen[r] - last.count[r]
            visible = (self.token <= at[:, None]) & self.valid[r]
            behind = at[:, None] - self.token  # the token at each distance
            inside = (behind >= 0) & (behind < len(self.token)) & there[:, None]
            behind = behind.clamp(0, len(self.token) - 1).long()
            for h in range(H):
                found = bits(keys[:, :, h])[row].view(keys.dtype).float().flatten(0, 1)  # [T, D]
                found = found.where(self.valid[r][:, None], 0)
                logits = last.query[r, :, h].float() @ found.T * blocks.scale  # [W, G, T]
                weights = logits.where(visible[:, None], -torch.inf).softmax(-1).mean(1)
                self.columns[r, h] = weights.where(there[:, None], 0).sum(0)
                self.diagonals[r, h] = weights.gather(1, behind).where(inside, 0).sum(0)
                self.means[r, :, h] = found.unflatten(0, (P, -1)).sum(1) / counted[r][:, None]

    def by_page(self, each: Tensor) -> Tensor:
        """[R, H, T] -> sums of pages [R, H, P]"""
        return each.unflatten(-1, (-1, self.size)).sum(-1)

    def touched(self, columns: Tensor, diagonals: Tensor) -> Tensor:
        """Pages of which some query of a block reads a token, by a column or by a diagonal. Both
        [R, H, T] bool -> [n, H, P] bool"""
        assert self.blocks.last is not None
        size, run, T = self.size, self.blocks.last.run, len(self.token)
        upright = columns.unflatten(-1, (-1, size)).any(-1)[run]
        counts = torch.nn.functional.pad(diagonals.long().cumsum(-1), (1, 0))  # [R, H, T + 1]
        first = self.page * size
        least = (self.blocks.start[:, None] - first - size + 1).clamp(0, T)  # [n, P]
        greatest = (self.stop[:, None] - first).clamp(0, T)
        head = torch.arange(counts.shape[1], device=run.device)[None, :, None]
        whose = run[:, None, None]
        between = counts[whose, head, greatest[:, None].long()]
        between = between - counts[whose, head, least[:, None].long()]
        return (upright | (between > 0)) & (self.page < self.pages[:, None, None])


def most(sums: Tensor, number: int, first: int) -> Tensor:
    """The greatest ones, the first ones among them. [R, H, T] -> bool"""
    sums = sums.clone()
    sums[..., :first] = torch.inf
    chosen = torch.zeros_like(sums, dtype=torch.bool)
    return chosen.scatter_(-1, sums.topk(min(number, sums.shape[-1])).indices, True)


def shares(wanted: Tensor, weight: Tensor) -> Tensor:
    """Of pages that are wanted, alike but for their order: those of most weight first. [n, H, P]
    each"""
    each = wanted * (1 + weight / weight.sum(-1, keepdim=True).clamp(min=1e-9))
    return each / each.sum(-1, keepdim=True).clamp(min=1)
