"""Pages of one KV head each, where the heads of a layer keep different numbers of them.

A page holds S tokens of each of H heads; a head page is S tokens of one. The private pages of a
request are H head pages each, given out head by head: of heads that keep n_h of them, head h has
those from n_0 + ... + n_h-1 on, and head page u is where head u % H has its tokens in private page
u // H. So k private pages hold them all where sum n_h <= H k, however unequal they are. Pages
behind them hold all heads' tokens, each where it always has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvplug.compress import HeadBudgets, ScoredEviction
from kvplug.policy import Positions


@dataclass(frozen=True, kw_only=True)
class HeadTokens:
    """Where the tokens go that heads keep, head by head; each array is [N] int64."""

    head: Positions
    index: Positions
    """Among those that the head keeps."""
    page: Positions
    """Which of the private pages."""
    place: Positions
    """Of which head the token lies in its place."""
    offset: Positions
    """In it."""

    @classmethod
    def of(cls, pages: Positions, page_size: int) -> HeadTokens:
        """pages: of each head. [H]"""
        tokens = pages * page_size
        flat, H = np.arange(tokens.sum()), len(pages)
        unit = flat // page_size
        return cls(
            head=np.repeat(np.arange(H), tokens),
            index=flat - np.repeat(np.cumsum(tokens) - tokens, tokens),
            page=unit // H,
            place=unit % H,
            offset=flat % page_size,
        )


@dataclass(frozen=True, kw_only=True)
class HeadPacking:
    """What heads that keep different numbers of tokens keep, head by head: N of all heads. On the
    device."""

    keep: Tensor
    """Tokens of each. [1, H] int64"""
    width: int
    """The most of them."""
    head: Tensor
    index: Tensor
    page: Tensor
    """As the engine numbers it."""
    place: Tensor
    """Of which head a token lies in its place. [N] int64, as the others"""
    offset: Tensor

    @classmethod
    def by_kinds(
        cls, scored: ScoredEviction | None, every: Iterable[tuple[bool, ...]], whole: int,
        private: Tensor, page_size: int, tensor: Callable[[Positions], Tensor],
    ) -> dict[tuple[bool, ...], HeadPacking]:  # fmt: skip
        """Of a prompt of so many whole pages, in the layers of each of these kinds. private: the
        pages it is packed into, [n] int64; tensor: puts an array on the device."""
        if not isinstance(scored, HeadBudgets):
            return {}
        found, counts = {}, (np.array([len(private)]), np.array([whole]))
        for kinds in every:
            pages = scored.head_pages(kinds, *counts, page_size)[0]
            to = HeadTokens.of(pages, page_size)
            found[kinds] = cls(
                keep=tensor(pages * page_size)[None],
                width=int(pages.max()) * page_size,
                head=tensor(to.head),
                index=tensor(to.index),
                page=private[tensor(to.page)],
                place=tensor(to.place),
                offset=tensor(to.offset),
            )
        return found

    def kept(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """What lies there. rows [1, T, H, D], tokens [1, H, width] -> [N, D]"""
        return rows[0][tokens[0][self.head, self.index], self.head]


def head_tables(
    table: Tensor, kept: Tensor, pages: Tensor, width: int, page_stride: int, head_stride: int
) -> Tensor:
    """Tables of the sequences that each KV head of each request is, over a cache of one KV head.

    table [Q, P] int: pages that a request sees, the kept [Q] private ones first; pages [Q, H]:
    head pages that each head has among those. Head h of page p of the cache is virtual page p *
    page_stride + h * head_stride. -> [Q * H, width] int32, with any page behind the last that a
    request sees.
    """
    H, kept, pages = pages.shape[1], kept.to(table.dtype), pages.to(table.dtype)
    column = torch.arange(width, dtype=table.dtype, device=table.device)
    unit = column + (pages.cumsum(1, dtype=table.dtype) - pages)[..., None]  # [Q, H, width]
    behind = column - pages[..., None]
    private, heads = behind < 0, torch.arange(H, dtype=unit.dtype, device=unit.device)
    page = torch.where(private, unit // H, behind + kept[:, None, None])
    place = torch.where(private, unit % H, heads[:, None])
    page = page.clamp_(max=table.shape[1] - 1).flatten(1).long()
    found = table.gather(1, page).view(place.shape) * page_stride + place * head_stride
    return found.flatten(0, 1).to(torch.int32)
