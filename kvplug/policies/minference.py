"""MInference: each KV head of a prompt reads by one of three patterns, which finds most of its
attention.

    p = softmax(scale q . k) of the last 64 queries, causal
    vertical_slash: query i reads token t  iff  t is a column or i - t a diagonal
        columns: the ``vertical`` tokens t of greatest sum_q p_qt, the first 30 among them
        diagonals: the ``slash`` distances d of greatest sum_q p_q,q-d, the last 100 among them
    a_shape: the first ``sinks`` tokens, and the last ``vertical + slash`` before a block
    block_sparse: as many, of the pages of greatest mean(q in the block) . mean(k in the page)

in whole pages. Without ``heads`` all have ``pattern``. ``heads`` names a file that ``kvplug
calibrate`` made for the model: a KV head has the pattern of the greatest recall there.

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention", NeurIPS 2024, https://arxiv.org/abs/2407.02490

Differs from the paper: query heads that share a KV head read the same pages (mean over the group);
all patterns read ``vertical + slash`` tokens, where a search offline gives each head its own sizes
and weighs them by the output of one sample; where a prompt comes in chunks, each asks its own last
queries; and of more than ``budget`` tokens the pages are read that those queries, nearness or the
estimate weigh most. On SmolLM2 and prompts of 3,072 tokens a file loses less than
``vertical_slash`` for all, and ``block_sparse`` for all less than the file (README, "What a policy
costs in answers").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from kvplug.generate import BlockSelector, QueryBlocks
from kvplug.heads import A_SHAPE, BLOCK_SPARSE, PATTERNS, VERTICAL_SLASH, read_heads
from kvplug_kernels.block_mean import block_mean
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
    pattern: str = VERTICAL_SLASH
    """Of all heads, where ``heads`` does not say: vertical_slash, a_shape or block_sparse."""
    heads: str | None = None
    """File of ``kvplug calibrate``, where the engine runs."""

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

        if self.pattern not in PATTERNS:
            raise ValueError(
                f"minference: pattern must be {', '.join(PATTERNS[:-1])} or {PATTERNS[-1]}, got "
                f"{self.pattern!r}; write minference(pattern={PATTERNS[0]!r})"
            )
        if self.heads is not None and not (isinstance(self.heads, str) and self.heads):
            raise ValueError(
                "minference: heads must name a file that kvplug calibrate made, got "
                f"{self.heads!r}; write minference(heads='heads.json')"
            )
        if self.heads is not None and self.pattern != PATTERNS[0]:
            raise ValueError(
                f"minference: the file {self.heads!r} gives each head its pattern, got "
                f"pattern={self.pattern!r} too; leave one of them out"
            )

    @property
    def mass(self) -> float:
        return WANTED

    @property
    def files(self) -> tuple[str, ...]:
        return () if self.heads is None else (self.heads,)

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
        H, G = blocks.query.shape[1:3]
        patterns = (self.pattern,) * H
        if self.heads is not None:
            patterns = read_heads(self.heads).patterns(blocks.first_head, H, G)
        read = self._by(patterns[0], blocks, seen)
        for pattern in sorted({*patterns} - {patterns[0]}):
            whose = _whose(patterns, pattern, pages.device)
            read = self._by(pattern, blocks, seen).where(whose, read)
        return read

    def _by(self, pattern: str, blocks: QueryBlocks, seen: Seen) -> Tensor:
        """What all heads would read by one pattern. [n, H, P]"""
        assert blocks.last is not None
        tokens, valid = self.vertical + self.slash, seen.page < seen.pages[:, None, None]
        if pattern == VERTICAL_SLASH:
            columns = most(seen.columns, self.vertical, FIRST)
            diagonals = most(seen.diagonals, self.slash, NEAREST)
            weight = seen.by_page(seen.columns)[blocks.last.run]
            return shares(seen.touched(columns, diagonals), weight)
        if pattern == A_SHAPE:
            first = (blocks.start - tokens + 1).clamp(min=0) // seen.size
            nearness = (seen.page + 1 - first[:, None, None]).clamp(min=0).float()
            nearness = nearness.expand(-1, blocks.query.shape[1], -1)
            return shares(valid & (nearness > 0), nearness)
        assert pattern == BLOCK_SPARSE
        weight = seen.pooled(blocks)
        rank = weight.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return shares(valid & (rank < -(-tokens // seen.size)), weight)


@lru_cache(maxsize=4096)
def _whose(patterns: tuple[str, ...], pattern: str, device: torch.device) -> Tensor:
    """[H, 1] bool; kept, since what a host writes a device waits for."""
    return torch.tensor([each == pattern for each in patterns], device=device)[:, None]


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

    def pooled(self, blocks: QueryBlocks) -> Tensor:
        """A block's share of each page by its mean query and the pages' mean keys. [n, H, P]"""
        assert blocks.last is not None
        n, (_, H, G, D) = len(self.pages), blocks.query.shape
        mean = block_mean(blocks.query.flatten(1, 2), blocks.bounds).view(n, H, G, D)
        logits = mean.new_zeros(n, H, G, len(self.page))
        for r, keys in enumerate(self.means):
            found = torch.einsum("nhgd,phd->nhgp", mean, keys)
            logits = found.where((blocks.last.run == r)[:, None, None, None], logits)
        seen = self.page < self.pages[:, None, None, None]
        return (logits * blocks.scale).where(seen, -torch.inf).softmax(-1).mean(2)

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
