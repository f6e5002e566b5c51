"""How many: what every query of a step reads, from lengths and the policy alone, on the host.

A step brings each request some query tokens. ``Planner.plan`` cuts them into ``Segments``: runs of
queries of one request that see the same pages. An engine's adapter turns segments into its own
tables and lengths; which pages a selecting query, or a block of a prompt's, reads is decided
later, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvplug.config import Settings
from kvplug.generate import BlockSelector, PositionalPrefill
from kvplug.load import Selector
from kvplug.policy import LIMIT, Positions
from kvplug.reuse import Arrangement, arrange
from kvplug.schedule import Schedule
from kvplug.segments import HELD, SINKS, Segments


class Planner:
    """Answers for one policy and one page size; holds no state of requests."""

    def __init__(
        self,
        settings: Settings,
        page_size: int,
        budget: int | None = None,
        narrowest: int | None = None,
    ) -> None:
        """budget: tokens that the planned layers keep of a prompt, where layers differ.
        narrowest: the least that any layer keeps, where the private pages span all of them: a
        prompt that some layer compresses is then packed in every one.
        """
        self.settings = settings
        self.page_size = page_size
        self.eviction = settings.policy.eviction
        self.selector = settings.policy.selector
        generate = settings.policy.generate
        self.generate = generate
        if generate is not None:
            generate.check_page(page_size)
        self.blocks = generate if isinstance(generate, BlockSelector) else None
        """What selects for blocks of a prompt's queries."""
        self.sinks = -(-generate.sinks // page_size) if generate else 0
        """Pages at the start that they read in any case."""
        self.held = self._held_pages()
        """Pages at the start and under protected spans, ascending: never evicted by position. [n]
        int64"""
        self.scored = settings.policy.scored
        self.schedule = Schedule(settings, page_size, budget, narrowest)
        """When requests are packed."""
        self.chunk = self.schedule.every if self.schedule.appends else 0
        """Pages of which each the first few are held, with what was kept of it."""
        self.compiled = settings.compiled if self.schedule.compiles else LIMIT
        """So many of them, at most."""
        self.reuse = settings.policy.reuse if settings.chunks else None
        """What takes the chunks that the request names from the cache."""
        self.page = self.selector.page(page_size) if self.selector else page_size
        """Tokens of what a digest describes: a page, or a part of it."""
        self.unit = self.selector.unit(self.page) if self.selector else page_size
        """Tokens of what a selection chooses as one."""

    def _held_pages(self) -> Positions:
        if self.eviction is None:
            return np.zeros(0, np.int64)
        spans = [(0, self.eviction.kept_from_start()), *self.settings.protect]
        pages = [np.arange(a // self.page_size, -(-b // self.page_size)) for a, b in spans]
        return np.unique(np.concatenate(pages)).astype(np.int64)

    def first_pages(self, positions: Positions) -> Positions:
        """The oldest page, beside the held ones, that a query at each position sees. [n] -> [n]"""
        if self.chunk:
            passed = positions // self.page_size // self.chunk
            return np.minimum(passed, self.compiled) * self.chunk
        if self.eviction is None:
            return np.zeros_like(positions)
        first = self.eviction.first_token(positions) // self.page_size
        return np.where(positions < self.settings.min_context, 0, first)

    def held_before(self, first: Positions) -> Positions:
        """How many of the held pages come before what ``first_pages`` says. [n] -> [n]"""
        if self.chunk:
            return first // self.chunk * self.schedule.kept
        return np.searchsorted(self.held, first)

    def held_pages(self, count: int) -> Positions:
        """The first so many of the held pages, at most, ascending. -> [n]"""
        if not self.chunk:
            return self.held[:count]
        index = np.arange(count)
        return index // self.schedule.kept * self.chunk + index % self.schedule.kept

    def plan(self, computed: Positions, total: Positions, prompt: Positions) -> Segments:
        """Segments of a step. Each request b brings the queries [computed[b], total[b]);
        its original prompt has prompt[b] tokens, also after a preemption. [B] each
        """
        queries = total - computed
        row = np.repeat(np.arange(len(queries)), queries)
        offset = np.cumsum(queries) - queries
        token = np.arange(len(row))
        position = token - offset[row] + computed[row]

        first = self.first_pages(position)
        kept = self.held_before(first)
        hidden = kept < first
        first, kept = np.where(hidden, first, 0), np.where(hidden, kept, 0)
        decodes = position >= prompt[row]
        packed, phase = np.full(len(row), HELD), np.zeros_like(row)
        away = np.zeros_like(row)
        if self.schedule.packs:
            schedule = self.schedule
            own = schedule.begin(prompt)[row]
            era = schedule.era(position, own)
            compressed = era >= 0
            if self.chunk:
                phase = schedule.phase(era, computed[row], own)
            elif compressed.any():
                first = np.where(compressed, schedule.first(era, own), first)
                kept = np.where(compressed, schedule.private(prompt)[row], kept)
                packed = np.where(compressed, schedule.column(own), packed)
                phase = np.where(compressed, schedule.phase(era, computed[row], own), phase)
                if schedule.placement is not None:
                    away = np.where(compressed, first, 0)
        for one, mine in self._arrangements(prompt[row]):
            kept[mine], first[mine] = one.seen(position[mine])
            packed[mine] = SINKS
        sparse = self._sparse(position, prompt[row])
        if isinstance(self.generate, PositionalPrefill):
            first, kept, packed = self._narrowed(sparse, position, first, kept, packed)
        selects = decodes if self.selector else np.zeros(len(row), bool)
        if self.settings.shortcut:
            hidden = np.where(away > 0, 0, first - kept)
            visible = position + 1 - hidden * self.page_size
            selects = selects & (position >= self.settings.min_context)
            selects = selects & (-(-visible // self.unit) > self.reads(visible))
            page = np.zeros_like(position)
        else:
            page = position // self.page_size
        block = np.full(len(row), -1)
        if self.blocks is not None:
            grid, before, most = self._blocks(position, first, kept)
            if self.settings.shortcut:
                choosing = self.sinks if self.blocks.mass is not None else most
                sparse = sparse & (before > choosing)
            block, page = np.where(sparse, grid, -1), np.where(sparse, 0, page)

        begins = np.ones(len(row), bool)
        each = row, first, kept, packed, page, decodes, block
        begins[1:] = np.logical_or.reduce([np.diff(one) != 0 for one in each])
        begins |= selects
        begins[1:] |= selects[:-1]
        selects = selects | (block >= 0)
        begin = np.flatnonzero(begins)
        end = np.append(begin[1:], len(row)) - 1
        stop = position[end] + 1 if len(begin) else position[begin]
        return Segments(
            row=row[begin],
            token=token[begin],
            start=position[begin],
            stop=stop,
            behind=np.maximum(np.minimum(total, prompt)[row[begin]] - stop, 0),
            kept=kept[begin],
            first=first[begin],
            packed=packed[begin],
            away=away[begin],
            phase=phase[begin],
            choice=np.zeros(len(begin), np.int64),
            selects=selects[begin],
            decodes=decodes[begin],
            page_size=self.page_size,
        )

    def arrangement(self, prompt: int) -> Arrangement:
        """Of a request with so long a prompt that names chunks, all of which are there."""
        assert self.reuse is not None
        return arrange(self.reuse, self.settings.chunks, prompt, self.page_size)

    def logical(self, position: Positions, prompt: Positions) -> Positions:
        """Where tokens at these places of requests with such prompts stand. [n] each -> [n]"""
        found = position.copy()
        for one, mine in self._arrangements(prompt):
            found[mine] = one.logical(position[mine])
        return found

    def _arrangements(self, prompt: Positions) -> Iterator[tuple[Arrangement, NDArray[np.bool_]]]:
        """Of each prompt's length, and whose it is. [n] -> [n]"""
        for tokens in np.unique(prompt).tolist() if self.reuse is not None else ():
            yield self.arrangement(tokens), prompt == tokens

    def _sparse(self, position: Positions, prompt: Positions) -> NDArray[np.bool_]:
        """Which queries read less because they are a prompt's. [n] each -> [n]"""
        if self.generate is None:
            return np.zeros(len(position), bool)
        end = prompt - self.generate.last
        return (position >= self.settings.min_context) & (position < end)

    def _narrowed(
        self, sparse: NDArray[np.bool_], position: Positions, first: Positions, kept: Positions,
        packed: Positions,
    ) -> tuple[Positions, Positions, Positions]:  # fmt: skip
        """What queries see of the pages from ``first`` on by their positions: beside the sinks, or
        the held pages once others have left. -> first, kept, packed [n]"""
        policy = self.generate
        assert isinstance(policy, PositionalPrefill)
        window = policy.first_token(position // policy.block * policy.block) // self.page_size
        # While an eviction still keeps some of what the sinks are, or has packed what stays of
        # the rest, it alone decides.
        holds = (packed == HELD) & (not self.chunk)
        known = (first == 0) | (holds & (first >= self.sinks))
        narrow = sparse & known & (window > np.maximum(first, self.sinks))
        own = narrow & (first == 0)
        kept = np.where(narrow, np.searchsorted(self.held, window), kept)
        return (
            np.where(narrow, window, first),
            np.where(own, self.sinks, kept),
            np.where(own, SINKS, packed),
        )

    def _blocks(
        self, position: Positions, first: Positions, kept: Positions
    ) -> tuple[Positions, Positions, Positions]:
        """The block of each query, how many of the pages that it sees stand before the block's
        own, and how many of those it reads at most: by positions alone, as wherever a chunk ends
        the rest of its block is chosen for as before. [n] each -> [n] each"""
        assert self.blocks is not None
        size, page = self.blocks.block, self.page_size
        grid = position // size
        begin = grid * size // page
        own = (grid * size + size - 1) // page - begin + 1
        before = np.maximum(begin - first, 0) + kept
        most = np.maximum(-(-self.blocks.budget // page) - own, self.sinks)
        return grid, before, np.minimum(before, most)

    def reads(self, visible: Positions, budget: int | float | None = None) -> Positions:
        """Units that a selecting query reads per KV head of so many tokens, in a layer of this
        budget. [n] -> [n]"""
        if self.selector is None:
            return -(-visible // self.unit)
        keep = self.selector.units(visible, self.page)
        if budget is None:
            return keep
        return np.minimum(keep, self.selector.units(visible, self.page, budget))

    def selection(self, segments: Segments, budget: int | float | None = None) -> Positions:
        """Units that selecting segments read per KV head, those of a prompt apart from others, in
        a layer of this budget; decoding ones that ``min_context`` spares all they see. -> [n]"""
        if self.blocks is not None and not segments.decodes.all():
            assert not segments.decodes.any(), "blocks and single queries select apart"
            _, _, most = self._blocks(segments.start, segments.first, segments.kept)
            return self.own_pages(segments) + most
        short = segments.stop <= self.settings.min_context
        whole = -(-segments.visible // self.unit)
        return np.where(short, whole, self.reads(segments.visible, budget))

    def own_pages(self, segments: Segments) -> Positions:
        """Pages that the queries of each block stand in, the last that it sees. -> [n]"""
        assert self.blocks is not None
        begin = segments.start // self.blocks.block * self.blocks.block // self.page_size
        return (segments.stop - 1) // self.page_size - np.maximum(begin, segments.first) + 1

    def chooser(self, decodes: bool) -> Selector | BlockSelector | None:
        """What selects for queries that decode, or for those of a prompt."""
        return self.selector if decodes else self.blocks

    def grain(self, decodes: bool) -> tuple[int, int]:
        """Tokens of a page, as ``chooser`` is asked about it, and of what it chooses as one."""
        return (self.page, self.unit) if decodes else (self.page_size, self.page_size)

    def layer_budget(self, layer: int, decodes: bool = True) -> int | float | None:
        """What a selecting segment reads in a layer, as policies say it; None for everything."""
        if not decodes:
            return self.blocks.budget if self.blocks else None
        return self.selector.layer_budget(layer) if self.selector else None

    def width(self, max_tokens: int, short: bool = True) -> int:
        """The widest selection, in units, of any request up to ``max_tokens``.

        short: requests that the shortcut would spare select too, with all that they have.
        """
        widest = int(self.reads(np.array([max_tokens]))[0])
        if short or not self.settings.shortcut:
            whole = -(-max(self.settings.min_context, 1) // self.unit)
            widest = max(widest, min(whole, -(-max_tokens // self.unit)))
        return widest

    def evictable(self, processed: int) -> list[tuple[int, int]]:
        """Ranges of pages [first, last) that no query from position ``processed`` on will see."""
        first = self.first_pages(np.array([processed]))
        edges = [-1, *self.held_pages(int(self.held_before(first)[0])).tolist(), int(first[0])]
        return [(a + 1, b) for a, b in pairwise(edges) if a + 1 < b]

    def needed(self, tokens: int) -> Positions:
        """Pages before position ``tokens`` that queries from there on see. -> [n] ascending"""
        first, last = self.first_pages(np.array([tokens])), tokens // self.page_size
        held = self.held_pages(int(self.held_before(np.minimum(first, last))[0]))
        return np.concatenate([held, np.arange(first[0], last)])

    def most_pages(self, in_flight: int, max_tokens: int) -> int:
        """The most pages a request holds while up to ``in_flight`` tokens are being computed."""
        processed = np.arange(max_tokens)
        first = self.first_pages(processed)
        last = (np.minimum(processed + in_flight, max_tokens) - 1) // self.page_size
        return int((self.held_before(first) + last - first + 1).max(initial=0))
