"""A step planned on the host: what each query of the batch reads, in slots of the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvplug import (
    BatchPlanner,
    Blocks,
    BlockSelector,
    Event,
    HeadBudgets,
    LayerReads,
    Observed,
    Planner,
    Segments,
    Selector,
    blocks_of,
    dense_reads,
    reads_by_policy,
)
from kvplug.head_pages import HeadPacking, head_tables
from kvplug.segments import SINKS
from kvplug_kernels.slot_lists import slot_lists
from kvplug_kernels.virtual_heads import virtual_heads
from kvplug_sglang.compression import Packing
from kvplug_sglang.router import OWN, Tenant
from kvplug_sglang.settings import Engine

Numbers = NDArray[np.int64]


@dataclass
class Whole:
    """Runs of queries and what each reads: n sequences for the stock kernel; [n] int32."""

    tokens: Tensor | None
    """Rows of the flat queries, in the order of the sequences; None for all as they come."""
    page_table: Tensor
    """Pages that each run sees, in order. [n, P] int32"""
    page_size: int
    lengths: Tensor
    """Tokens that the last query of each run sees."""
    queries: Tensor
    longest_run: int
    total: int
    """Of the queries."""

    def cache(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's [slots, H, D], as the sequences read it."""
        return keys, values

    @cached_property
    def starts(self) -> Tensor:
        """Where each run's queries begin, and the last's end. [n + 1] int32"""
        bounds = self.queries.new_zeros(len(self.queries) + 1)
        bounds[1:] = self.queries.cumsum(0)
        return bounds

    def lists(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens of each run's pages, as ``slot_lists``."""
        return slot_lists(self.page_table, lengths, self.page_size)

    @cached_property
    def seen(self) -> tuple[Tensor, Tensor]:
        """What each run sees."""
        return self.lists(self.lengths)

    @cached_property
    def before(self) -> tuple[Tensor, Tensor]:
        """What each run's first query sees beside itself."""
        return self.lists(self.lengths - self.queries)

    @cached_property
    def slots(self) -> Tensor:
        """[n, P * S] int64"""
        return tokens_of(self.page_table, self.page_size)

    @cached_property
    def own(self) -> Tensor:
        """Where the queries' own tokens lie, in their order. [total] int64"""
        run = torch.arange(len(self.queries), device=self.queries.device)
        run = run.repeat_interleave(self.queries, output_size=self.total)
        query = torch.arange(self.total, device=run.device)
        token = self.lengths[run] - self.starts[run + 1] + query
        return self.token(run, token // self.page_size, token % self.page_size)

    def token(self, run: Tensor, page: Tensor, offset: Tensor) -> Tensor:
        """Slots of tokens of pages that runs see. [n] int64 each"""
        return self.page_table[run, page].long() * self.page_size + offset


@dataclass
class Heads(Whole):
    """Runs that are each read by one KV head: over the cache as one of a single head, whose slot s
    * H + h is slot s of head h. In the page table stand the first slots of pages, whose tokens lie
    H slots apart."""

    heads: int
    order: Tensor | None
    """The runs' queries, as ``Segments.by_head``; None where each is of one."""

    @classmethod
    def of(cls, step: Selected, chosen: Tensor, counts: Tensor, page_size: int) -> Heads:
        """Blocks of queries whose KV heads chose pages. chosen [n, H, K], counts [n, H]"""
        blocks, heads = step.blocks, chosen.shape[1]
        assert blocks is not None
        table, lengths = virtual_heads(
            step.page_table, chosen, counts, step.lengths, page_size, page_size * heads, 1,
            token_stride=heads,
        )  # fmt: skip
        return cls(
            tokens=step.tokens,
            page_table=table,
            page_size=page_size,
            lengths=lengths,
            queries=blocks.bounds.diff().repeat_interleave(heads),
            longest_run=step.longest_run,
            total=len(blocks.rows),
            heads=heads,
            order=blocks.rows,
        )

    def cache(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys.view(-1, 1, keys.shape[2]), values.view(-1, 1, values.shape[2])

    def lists(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return slot_lists(self.page_table, lengths, self.page_size, token_stride=self.heads)

    @cached_property
    def slots(self) -> Tensor:
        offset = torch.arange(self.page_size, device=self.page_table.device) * self.heads
        return (self.page_table.long()[:, :, None] + offset).flatten(1)

    def token(self, run: Tensor, page: Tensor, offset: Tensor) -> Tensor:
        return self.page_table[run, page].long() + offset * self.heads


@dataclass
class Selected:
    """Single queries of one policy that read a selection, or blocks of a prompt's; Q of them, [Q]
    int32 unless said."""

    selector: Selector | BlockSelector
    tokens: Tensor | None
    """Rows of the flat queries, int64; None for all as they come."""
    page_table: Tensor  # [Q, P]
    pages: Tensor
    keep: dict[int | float, Tensor]
    """By a layer's budget."""
    lengths: Tensor
    page: int
    """Tokens of what a digest describes."""
    unit: int
    """Tokens of what is chosen as one."""
    width: int
    """Units."""
    blocks: Blocks | None = None
    """None for single queries."""
    open: Tensor | None = None
    """Where pages are kept in a format, the newest of each among the plain ones."""
    longest_run: int = 1
    """Queries of the longest block."""


@dataclass
class Phase:
    """What a layer does in one go: it packs, then reads."""

    packings: Sequence[Packing]
    layers: Mapping[int, LayerReads[Whole, Selected] | None]
    """What each reads; None where the engine's own path serves it."""


@dataclass
class StepPlan:
    phases: Sequence[Phase]
    """One, unless a request comes back with an answer that was packed more than once."""
    observations: Sequence[tuple[Tenant, Observed]] = ()


@dataclass
class Batch:
    """A forward batch as far as planning needs it: B requests in order."""

    rows: Tensor
    """Their rows of the pool. [B] int64"""
    computed: Numbers  # [B]
    total: Numbers  # [B]
    tenants: list[Tenant]
    slots: Tensor
    """Where the step's tokens go. [T] int64"""

    @cached_property
    def prompt(self) -> Numbers:
        return np.array([tenant.prompt for tenant in self.tenants], np.int64)

    @cached_property
    def choice(self) -> Numbers:
        return np.array([tenant.choice for tenant in self.tenants], np.int64)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which of them hold a row: the others are padding. [B]"""
        return np.array([tenant.row >= 0 for tenant in self.tenants], np.bool_)

    @property
    def queries(self) -> int:
        return int((self.total - self.computed).sum())


class StepPlanner:
    """Turns batches into plans, for the layers of an engine that keep as much."""

    stock_serves: ClassVar[bool] = True
    """Whether the engine's own path reads what the pool holds."""

    def __init__(
        self, engine: Engine, planners: BatchPlanner, req_to_token: Tensor,
        layers: Sequence[int], share: float,
    ) -> None:  # fmt: skip
        """share: of the engine's layers, as its counters are means over them all."""
        self.engine = engine
        self.planners = planners
        self.req_to_token = req_to_token
        self.page_size = engine.page_size
        self.layers = layers
        self.share = share
        scored = engine.offer.settings.policy.scored
        kinds = [] if scored is None else [scored.kinds(layer) for layer in layers]
        self.kinds = sorted({each for each in kinds if each is not None})
        """Of the layers whose KV heads keep different numbers of pages."""

    def plan(self, batch: Batch) -> StepPlan | None:
        """None where the engine's own path serves the whole step and nothing is kept of it."""
        segments = self.segments(batch)
        self.count(segments)
        observations = self._observations(batch)
        packings = [self._packing(batch, event) for event in self.events(batch)]
        shortcut = self.stock_serves and self.engine.offer.settings.shortcut
        stock = segments.untouched and shortcut
        if stock and not packings and not observations:
            return None
        if stock:
            return StepPlan([Phase(packings, dict.fromkeys(self.layers))], observations)
        phases = []
        for number in range(int(segments.phase.max(initial=0)) + 1):
            layers = self.planners.by_layer(
                segments.where(segments.phase == number),
                self.layers,
                lambda rest, _, kinds: (
                    self._whole(batch, rest) if kinds is None else self._heads(batch, rest, kinds)
                ),
                partial(self._selected, batch),
            )
            mine = [packing for packing in packings if packing.phase == number]
            phases.append(Phase(mine, layers))
        return StepPlan(phases, observations)

    def eager(self, batch: Batch) -> bool:
        """Whether a decode step does what no graph replays: it packs, or keeps queries."""
        return bool(self.events(batch) or self._observations(batch))

    def segments(self, batch: Batch) -> Segments:
        self.planners.know(self.engine.choices.settings)
        return self.planners.plan(batch.choice, batch.computed, batch.total, batch.prompt)

    def moved(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows of the step's flat queries that stand elsewhere in their request than they lie, and
        where. [n] int64 each"""
        self.planners.know(self.engine.choices.settings)
        found = self.planners.moved(batch.choice, batch.computed, batch.total, batch.prompt)
        tokens, stands = map(self._tensor, found)
        return tokens, stands

    def planner(self, choice: int) -> Planner:
        self.planners.know(self.engine.choices.settings)
        return self.planners.planners[choice]

    def count(self, segments: Segments) -> None:
        metrics = self.engine.metrics
        if metrics is not None:
            counted = reads_by_policy(segments, self.planners.planners, self.layers)
            for settings, reads in counted:
                metrics.count(str(settings.policy), reads, self.share, *self._bytes)

    @property
    def _bytes(self) -> tuple[float, float]:
        """Of a token in the planned layers, and of its share of their digests."""
        layers, (token, digest) = len(self.layers), self.engine.layer_bytes
        return layers * token, layers * digest

    def count_dense(self, batch: Batch) -> None:
        """Without a plan: each query behind its prompt reads all up to itself."""
        metrics = self.engine.metrics
        if metrics is None:
            return
        known = batch.known
        reads = dense_reads(batch.computed[known], batch.total[known], batch.prompt[known])
        policy = str(self.planner(OWN).settings.policy)
        metrics.count(policy, reads, self.share, *self._bytes)

    def _observations(self, batch: Batch) -> list[tuple[Tenant, Observed]]:
        seen = self.planners.observed(batch.choice, batch.computed, batch.total, batch.prompt)
        return [(batch.tenants[each.row], each) for each in seen]

    def events(self, batch: Batch) -> list[Event]:
        """Those that a step packs, one at a time, so that the memory it takes is that of one.

        A prompt's end is packed by the step that computes its last token, behind which the tree
        takes it; what follows by the step that passes it, from what earlier ones have written.
        """
        self.planners.know(self.engine.choices.settings)
        choice, computed, total, prompt = batch.choice, batch.computed, batch.total, batch.prompt

        def ends(event: Event) -> bool:
            return not event.era and event.tokens == prompt[event.row]

        ending = self.planners.events(choice, computed + 1, total + 1, prompt)
        passing = self.planners.events(choice, computed, total, prompt)
        return [e for e in ending if ends(e)] + [e for e in passing if not ends(e)]

    def _packing(self, batch: Batch, event: Event) -> Packing:
        tenant, size = batch.tenants[event.row], self.page_size
        planner = self.planner(tenant.choice)
        assert planner.scored is not None
        assert tenant.private >= event.kept, "a request has not the private pages it should have"
        if self.engine.metrics is not None:
            policy = str(planner.settings.policy)
            self.engine.metrics.count_packed(policy, event, self.share)
        pages = self.engine.router.pages[tenant.row, : tenant.private]
        private = tokens_of(pages[None], size)[0]
        begin = event.pages.start * size
        rows = self.req_to_token[tenant.row, begin : begin + event.tokens - event.private * size]
        return Packing(
            scored=planner.scored,
            protect=event.protect,
            tenant=tenant,
            slots=torch.cat([private[: event.private * size], rows.long()]),
            targets=private[: event.kept * size],
            era=event.era,
            row=event.row,
            phase=event.phase,
            by_head=HeadPacking.by_kinds(
                planner.scored,
                self.kinds,
                event.tokens // size,
                pages[: event.kept].long(),
                size,
                self._tensor,
            ),
        )

    def _whole(self, batch: Batch, segments: Segments) -> Whole:
        """Sequences for the stock kernel."""
        tokens = segments.flat
        in_order = len(tokens) == batch.queries and bool((np.diff(tokens) == 1).all())
        return Whole(
            tokens=None if in_order else self._tensor(tokens),
            page_table=self._table(batch, segments),
            page_size=self.page_size,
            lengths=self._tensor(segments.visible, torch.int32),
            queries=self._tensor(segments.queries, torch.int32),
            longest_run=int(segments.queries.max()),
            total=len(tokens),
        )

    def _heads(self, batch: Batch, segments: Segments, kinds: tuple[bool, ...]) -> Heads:
        """The same in layers whose KV heads are of these kinds."""
        tokens, heads = segments.flat, len(kinds)
        pages = self.head_pages(kinds, segments)
        read = segments.visible + (pages.max(1) - segments.kept) * self.page_size
        in_order = len(tokens) == batch.queries and bool((np.diff(tokens) == 1).all())
        single = bool((segments.queries == 1).all())
        return replace(
            self.heads_of(
                self._table(batch, segments),
                self._tensor(segments.kept),
                self._tensor(segments.visible),
                self._tensor(pages),
                -(-int(read.max()) // self.page_size),
            ),
            tokens=None if in_order else self._tensor(tokens),
            queries=self._tensor(np.repeat(segments.queries, heads), torch.int32),
            longest_run=int(segments.queries.max()),
            total=len(tokens) * heads,
            order=None if single else self._tensor(segments.by_head(heads)),
        )

    def head_pages(self, kinds: tuple[bool, ...], segments: Segments) -> Numbers:
        """Private pages that each KV head of such kinds reads. [n, H]"""
        scored = self.planner(OWN).scored  # alone on its server
        assert isinstance(scored, HeadBudgets)
        return scored.head_pages(kinds, segments.kept, segments.first, self.page_size)

    def heads_of(
        self, table: Tensor, kept: Tensor, visible: Tensor, pages: Tensor, width: int
    ) -> Heads:
        """Of a query for each row. table [n, P], kept, visible [n] as in ``Segments``, pages
        [n, H] of each head, width: pages that one reads at most. Nothing synchronises."""
        (n, heads), size = pages.shape, self.page_size
        lengths = (visible - kept * size)[:, None] + pages * size
        return Heads(
            tokens=None,
            page_table=head_tables(table, kept, pages, width, size * heads, 1),
            page_size=size,
            lengths=lengths.flatten().int(),
            queries=torch.ones(n * heads, dtype=torch.int32, device=table.device),
            longest_run=1,
            total=n * heads,
            heads=heads,
            order=None,
        )

    def plan_singles(self, phases: Sequence[Phase], rows: Tensor, slots: Tensor) -> StepPlan:
        """Of a step with a query for each row, in shapes that follow from their number, as the
        next two: so that a graph may hold it."""
        return StepPlan(phases)

    def whole_singles(self, table: Tensor, lengths: Tensor) -> Whole:
        return Whole(
            tokens=None,
            page_table=table,
            page_size=self.page_size,
            lengths=lengths,
            queries=torch.ones_like(lengths),
            longest_run=1,
            total=len(lengths),
        )

    def open_singles(self, count: int) -> Tensor | None:
        """Their newest pages, where those are kept apart."""
        return None

    def _selected(self, batch: Batch, segments: Segments) -> Selected:
        """segments: of one choice, single queries that decode or blocks of prompts."""
        planner, decodes = self.planner(int(segments.choice[0])), bool(segments.decodes[0])
        selector = planner.chooser(decodes)
        assert selector is not None
        page, unit = planner.grain(decodes)
        return Selected(
            selector=selector,
            tokens=self._tensor(segments.flat),
            page_table=self._table(batch, segments),
            pages=self._tensor(-(-segments.visible // page), torch.int32),
            keep={
                budget: self._tensor(planner.selection(segments, budget), torch.int32)
                for budget in selector.budgets(self.layers)
            },
            lengths=self._tensor(segments.visible, torch.int32),
            page=page,
            unit=unit,
            width=int(planner.selection(segments).max()),
            blocks=None
            if decodes
            else blocks_of(planner, segments, self.engine.kv_heads, self._tensor),
            longest_run=int(segments.queries.max()),
        )

    def _table(self, batch: Batch, segments: Segments) -> Tensor:
        """Pages that each segment sees, in order, as the pool numbers them. -> [n, P] int32

        What stands in a request's row for pages it no longer has is skipped, never read.
        """
        column = torch.arange(int(segments.pages.max()), device=self.req_to_token.device)[None]
        return self.table(
            batch.rows[self._tensor(segments.row)],
            self._tensor(segments.kept),
            self._tensor(segments.first),
            self._tensor(segments.packed),
            self._held(segments, column),
            column,
        )

    def table(
        self,
        row: Tensor,
        kept: Tensor,
        first: Tensor,
        packed: Tensor,
        held: Tensor,
        column: Tensor,
    ) -> Tensor:
        """row, kept, first, packed [n] as in ``Segments``, held [n, P] or [1, P] pages that no
        policy evicts, column [1, P] -> [n, P] int32. Nothing synchronises.
        """
        size, pages = self.page_size, self.engine.router.pages
        row, kept = row[:, None], kept[:, None]
        page = torch.where(column < kept, held, column - kept + first[:, None])
        token = (page * size).clamp(max=self.req_to_token.shape[1] - 1)
        private = pages[row, column.clamp(max=pages.shape[1] - 1)]
        return torch.where(
            (packed[:, None] >= 0) & (column < kept),
            private,
            self.req_to_token[row, token] // size,
        )

    def _held(self, segments: Segments, column: Tensor) -> Tensor:
        """The pages that each segment's policy never evicts, in order; 0 behind. -> [n, P]"""
        held = {one: self.planner(one).held for one in np.unique(segments.choice).tolist()}
        width = max(map(len, held.values())) + 1
        table = np.zeros((max(held) + 1, width), np.int64)
        for one, pages in held.items():
            table[one, : len(pages)] = pages
        chosen = self._tensor(table)[self._tensor(segments.choice)[:, None]]  # [n, 1, width]
        kept = chosen[:, 0].gather(1, column.clamp(max=width - 1).expand(len(segments.row), -1))
        return torch.where(
            self._tensor(segments.packed == SINKS, torch.bool)[:, None], column, kept
        )

    def _tensor(self, values: NDArray[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(values).to(self.req_to_token.device, dtype, non_blocking=True)


def tokens_of(pages: Tensor, page_size: int) -> Tensor:
    """pages [n, P] -> their tokens' slots [n, P * S] int64"""
    offset = torch.arange(page_size, device=pages.device)
    return (pages.long()[:, :, None] * page_size + offset).flatten(1)
