"""Which: the units that each KV head of each query reads, decided on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvplug.generate import BlockSelector, LastQueries, QueryBlocks
from kvplug.load import Selector, TokenSelector
from kvplug.plan import Planner
from kvplug.segments import Segments
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.page_select import page_select
from kvplug_kernels.shapes import by_page
from kvplug_kernels.token_select import token_select

ROOM = 1 << 29
"""Bytes of a step's logits at once: a request's are as many as its longest may have tokens."""


def logits_bytes(queries: int, heads: int, tokens: int) -> int:
    """What choosing among tokens takes at once, with its weights. heads: query heads."""
    return 2 * min(4 * queries * heads * tokens, max(ROOM, 4 * heads * tokens))


def choose_units(
    selector: Selector,
    query: Tensor,
    digest: Tensor | None,
    page_table: Tensor,
    pages: Tensor,
    lengths: Tensor,
    keep: Tensor,
    *,
    page_size: int,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Logical units of ``selector.unit(page_size)`` tokens, ascending, and how many count.

    page_size: ``selector.page`` of the engine's blocks, which page_table names.

    query [B, H, G, D], digest [N, H, rows, D], page_table [B, P], pages [B] that count, lengths
    [B] tokens in them, keep [B] at most so many (never above ``width``) -> chosen [B, H, width],
    counts [B, H] int32. The newest page is always among them. Nothing synchronises, so a CUDA
    graph may capture it.
    """
    if digest is not None and digest.dtype not in FP8:
        query = query.to(digest.dtype)  # of the cache, which need not be the model's
    if isinstance(selector, TokenSelector):
        tokens = page_table.shape[1] * page_size
        if digest is not None:
            tokens *= by_page(digest).shape[1]
        each = 4 * query.shape[1] * query.shape[2] * tokens
        rows = max(1, ROOM // each)
        parts = [
            _choose_tokens(
                selector, query[row:][:rows], digest, page_table[row:][:rows],
                lengths[row:][:rows], keep[row:][:rows], page_size, width, scale,
            )
            for row in range(0, max(1, len(query)), rows)
        ]  # fmt: skip
        if len(parts) == 1:
            return parts[0]
        chosen, counts = zip(*parts, strict=True)
        return torch.cat(chosen), torch.cat(counts)
    scores = selector.score(query, digest, page_table, pages, page_size)
    if selector.mass is not None:
        scores = scores * scale
    return page_select(
        scores, pages, keep, width, top_p=selector.mass, minimum=min(selector.min_pages, width)
    )


def block_bytes(
    selector: BlockSelector, queries: int, heads: int, group: int, dim: int, tokens: int,
    page_size: int,
) -> int:  # fmt: skip
    """What choosing pages for so many queries of prompts takes at once, over contexts of so many
    tokens. heads: KV heads, each of ``group`` query heads of ``dim`` numbers."""
    shares = 4 * -(-queries // selector.block) * heads * -(-tokens // page_size)
    if not selector.asks:
        return 2 * shares
    one = 4 * tokens * (3 * selector.asks * group + 2 * dim)  # prompt and KV head: logits and keys
    return (2 + 3 * group) * shares + one


@dataclass
class Asking:
    """As ``LastQueries``, by rows of a step's flat queries. On the device."""

    rows: Tensor
    """[R, W] int64"""
    count: Tensor
    seen: Tensor
    block: Tensor
    run: Tensor

    @classmethod
    def of(cls, segments: Segments, most: int, tensor: Callable[..., Tensor]) -> Asking:
        """segments: blocks of prompts, one prompt's after the other's"""
        last = np.flatnonzero(np.append(np.diff(segments.row) != 0, True))
        first = np.append(0, last[:-1] + 1)
        behind = segments.behind[last]
        end = segments.token[last] + segments.queries[last] + behind
        count = np.minimum(end - segments.token[first], most)
        rows = np.maximum(end[:, None] + np.arange(-most, 0), (end - count)[:, None])
        return cls(
            rows=tensor(rows, torch.int64),
            count=tensor(count, torch.int32),
            seen=tensor(segments.visible[last] + behind, torch.int32),
            block=tensor(last, torch.int64),
            run=tensor(np.repeat(np.arange(len(last)), last - first + 1), torch.int64),
        )

    def queries(self, step: Tensor) -> LastQueries:
        """step: all of its queries. [T, H, G, D]"""
        return LastQueries(
            query=step[self.rows], count=self.count, seen=self.seen, block=self.block,
            run=self.run,
        )  # fmt: skip


@dataclass
class Blocks:
    """Of a step, on the device: n blocks of T queries of prompts, one after the other."""

    size: int
    """Their grid's."""
    bounds: Tensor
    """[n + 1] int32, among the T"""
    start: Tensor
    """Position of the first query of each among the tokens that it sees. [n] int32"""
    own: Tensor
    """Pages that each stands in. [n] int32"""
    sinks: int
    """Pages that each reads in any case."""
    rows: Tensor
    """``Segments.by_head``. [T * H] int64"""
    asking: Asking | None = None
    """Whom the policy asks beside them."""


def blocks_of(
    planner: Planner, segments: Segments, heads: int, tensor: Callable[..., Tensor]
) -> Blocks:
    """segments: selecting ones of prompts, by that planner. tensor: (array, dtype) -> device"""
    assert planner.blocks is not None
    queries, asks = segments.queries, planner.blocks.asks
    return Blocks(
        size=planner.blocks.block,
        bounds=tensor(np.append(0, np.cumsum(queries)), torch.int32),
        start=tensor(segments.visible - queries, torch.int32),
        own=tensor(planner.own_pages(segments), torch.int32),
        sinks=planner.sinks,
        rows=tensor(segments.by_head(heads), torch.int64),
        asking=Asking.of(segments, asks, tensor) if asks else None,
    )


def choose_pages(
    selector: BlockSelector,
    blocks: Blocks,
    query: Tensor,
    keys: Tensor | None,
    digest: Tensor | None,
    page_table: Tensor,
    pages: Tensor,
    keep: Tensor,
    *,
    width: int,
    scale: float,
    step: Tensor | None = None,
    first_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logical pages that each KV head of n blocks of queries reads, ascending, and how many.

    query [T, H, G, D], keys, digest, page_table [n, P], pages [n]: as ``BlockSelector.score``.
    step: all queries of the step, for a policy that asks others than the blocks'. first_head: the
    number of head 0, counted through the model, for one that tells heads apart.
    keep [n]: at most so many pages, the sinks and the block's own among them (never above
    ``width``) -> chosen [n, H, width], counts [n, H] int32. Those are always read; then the
    largest shares, the lower page first among equals, while what is read holds less than
    ``selector.threshold``. Nothing synchronises.
    """
    last = None
    if blocks.asking is not None:
        assert step is not None
        last = blocks.asking.queries(step)
    asking = QueryBlocks(
        query=query, bounds=blocks.bounds, start=blocks.start, size=blocks.size, scale=scale,
        last=last, first_head=first_head,
    )  # fmt: skip
    shares = selector.score(asking, keys, digest, page_table, pages)
    threshold = selector.mass
    if threshold is not None:
        shares = shares.log()  # of which the softmax is the share
    return page_select(
        shares, pages, keep, width, top_p=threshold, sinks=blocks.sinks, newest=blocks.own
    )


def _choose_tokens(
    selector: TokenSelector, query: Tensor, digest: Tensor | None, page_table: Tensor,
    lengths: Tensor, keep: Tensor, page_size: int, width: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    full = (lengths.clamp(min=1) - 1) // page_size
    logits = selector.score(query, digest, page_table, full, page_size)
    # A table that no step is wide enough for still names what each query must read.
    most = max(width, selector.least(page_size))
    chosen, counts = token_select(
        logits, query.shape[1], lengths, page_size, keep, most, scale,
        top_p=selector.mass, sinks=selector.sinks,
    )  # fmt: skip
    return chosen[:, :, :width], counts
