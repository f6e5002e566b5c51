"""A step planned on the host: what each query of the batch reads, in slots of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvplug import Observed, ScoredEviction, Segments, Selector, reads_by_policy
from kvplug_sglang.router import Tenant
from kvplug_sglang.settings import Engine

Numbers = NDArray[np.int64]


@dataclass
class Whole:
    """Runs of queries and what each reads: n sequences for the stock kernel."""

    tokens: Tensor | None
    """Rows of the flat queries, in the order of the sequences; None for all as they come."""
    slots: Tensor
    """Where the tokens that each run sees lie, in order. [n, T] int64"""
    lengths: Tensor
    """Tokens that the last query of each run sees. [n] int64"""
    queries: Tensor
    """[n] int64"""
    longest_run: int


@dataclass
class Selected:
    """Single queries of one policy that read a selection; Q of them, [Q] int32 unless said."""

    selector: Selector
    tokens: Tensor  # [Q] int64 rows of the flat queries
    page_table: Tensor  # [Q, P]
    pages: Tensor
    keep: Tensor
    lengths: Tensor
    width: int


@dataclass
class Packing:
    """Prompts of one policy whose kept tokens are packed in this step; J of them."""

    scored: ScoredEviction
    protect: Sequence[tuple[int, int]]
    tenants: list[Tenant]
    slots: Tensor
    """Where the prompts' tokens lie, in order. [J, T] int64"""
    lengths: Tensor  # [J] int64 prompt tokens
    keep: Tensor  # [J] int64 tokens kept
    width: int
    """The most tokens kept."""
    targets: Tensor
    """Where kept token k of prompt j goes, and which they are: rows of [J * width]. [n] int64"""
    packed: Tensor  # [n] int64


@dataclass
class Observation:
    tenant: Tenant
    seen: Observed


@dataclass
class StepPlan:
    every: Whole | None
    """All queries, for layers that select nothing; None where the engine's own path serves."""
    rest: Whole | None = None
    """For layers that select: the queries that do not."""
    selected: list[Selected] = field(default_factory=list)
    packings: list[Packing] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)


@dataclass
class Batch:
    """A forward batch as far as planning needs it: B requests in order."""

    rows: Tensor
    """Their rows of the pool. [B] int64"""
    computed: Numbers  # [B]
    total: Numbers  # [B]
    tenants: list[Tenant]

    @cached_property
    def prompt(self) -> Numbers:
        return np.array([tenant.prompt for tenant in self.tenants], np.int64)

    @cached_property
    def choice(self) -> Numbers:
        return np.array([tenant.choice for tenant in self.tenants], np.int64)

    @property
    def queries(self) -> int:
        return int((self.total - self.computed).sum())


class StepPlanner:
    """Turns batches into plans, for one engine."""

    def __init__(self, engine: Engine, req_to_token: Tensor, layers: range) -> None:
        self.engine = engine
        self.req_to_token = req_to_token
        self.page_size = engine.page_size
        self.layers = layers

    def plan(self, batch: Batch) -> StepPlan | None:
        """None where the engine's own path serves the whole step and nothing is kept of it."""
        planners = self.engine.planners
        segments = planners.plan(batch.choice, batch.computed, batch.total, batch.prompt)
        self._count(segments)
        private = planners.private_pages(batch.choice, batch.prompt)
        observations = self._observations(batch)
        packings = self._packings(batch, private)
        if segments.untouched and self.engine.offer.settings.shortcut:
            if not packings and not observations:
                return None
            return StepPlan(None, packings=packings, observations=observations)
        plan = StepPlan(self._whole(batch, segments), packings=packings, observations=observations)
        if segments.selects.any():
            rest = segments.where(~segments.selects)
            if len(rest.row):
                plan.rest = self._whole(batch, rest)
            chosen = segments.where(segments.selects).by_choice()
            plan.selected = [self._selected(batch, part) for part in chosen.values()]
        return plan

    def _count(self, segments: Segments) -> None:
        metrics = self.engine.metrics
        if metrics is not None:
            planners = self.engine.planners.planners
            for settings, reads in reads_by_policy(segments, planners, self.layers):
                metrics.count(str(settings.policy), reads)

    def _observations(self, batch: Batch) -> list[Observation]:
        seen = self.engine.planners.observed(
            batch.choice, batch.computed, batch.total, batch.prompt
        )
        return [Observation(batch.tenants[each.row], each) for each in seen]

    def _packings(self, batch: Batch, private: Numbers) -> list[Packing]:
        """The requests whose prompt's last token is computed in this step, by policy."""
        ends = (batch.computed < batch.prompt) & (batch.prompt <= batch.total)
        rows = np.flatnonzero(ends & (private > 0))
        choices = np.unique(batch.choice[rows]).tolist()
        return [self._packing(batch, rows[batch.choice[rows] == one], private) for one in choices]

    def _packing(self, batch: Batch, rows: Numbers, private: Numbers) -> Packing:
        tenants = [batch.tenants[row] for row in rows]
        planner = self.engine.planner(tenants[0].choice)
        assert planner.scored is not None
        held = [tenant.private for tenant in tenants]
        assert held == private[rows].tolist(), "a prompt has not the private pages it should have"
        size, prompt = self.page_size, batch.prompt[rows]
        keep = private[rows] * size
        width = int(keep.max())
        at = batch.rows[self._tensor(rows)]
        column = torch.arange(int(prompt.max()), device=self.req_to_token.device)
        packed = np.flatnonzero((np.arange(width)[None] < keep[:, None]).ravel())
        index = self._tensor(packed)
        if self.engine.metrics is not None:
            self.engine.metrics.count_packed(
                str(planner.settings.policy), prompt, keep + prompt % size
            )
        return Packing(
            scored=planner.scored,
            protect=planner.settings.protect,
            tenants=tenants,
            slots=self.req_to_token[at[:, None], column].long(),
            lengths=self._tensor(prompt),
            keep=self._tensor(keep),
            width=width,
            targets=self._tokens_of(self.engine.router.pages[at, : width // size]).flatten()[
                index
            ],
            packed=index,
        )

    def _whole(self, batch: Batch, segments: Segments) -> Whole:
        """Sequences for the stock kernel."""
        tokens = segments.flat
        in_order = len(tokens) == batch.queries and bool((np.diff(tokens) == 1).all())
        return Whole(
            tokens=None if in_order else self._tensor(tokens),
            slots=self._tokens_of(self._table(batch, segments)),
            lengths=self._tensor(segments.visible),
            queries=self._tensor(segments.queries),
            longest_run=int(segments.queries.max()),
        )

    def _selected(self, batch: Batch, segments: Segments) -> Selected:
        """segments: of one choice."""
        planner = self.engine.planner(int(segments.choice[0]))
        assert planner.selector is not None
        keep = planner.selection(segments)
        return Selected(
            selector=planner.selector,
            tokens=self._tensor(segments.token),
            page_table=self._table(batch, segments),
            pages=self._tensor(segments.pages, torch.int32),
            keep=self._tensor(keep, torch.int32),
            lengths=self._tensor(segments.visible, torch.int32),
            width=int(keep.max()),
        )

    def _table(self, batch: Batch, segments: Segments) -> Tensor:
        """Pages that each segment sees, in order, as the pool numbers them. -> [n, P] int32

        What stands in a request's row for pages it no longer has is skipped, never read.
        """
        device, size, pages = self.req_to_token.device, self.page_size, self.engine.router.pages
        row = batch.rows[self._tensor(segments.row)][:, None]
        column = torch.arange(int(segments.pages.max()), device=device)[None]
        kept, first = self._tensor(segments.kept)[:, None], self._tensor(segments.first)[:, None]
        packed = self._tensor(segments.packed)[:, None] >= 0
        page = torch.where(column < kept, self._held(segments, column), column - kept + first)
        token = (page * size).clamp(max=self.req_to_token.shape[1] - 1)
        private = pages[row, column.clamp(max=pages.shape[1] - 1)]
        return torch.where(
            packed & (column < kept), private, self.req_to_token[row, token] // size
        )

    def _held(self, segments: Segments, column: Tensor) -> Tensor:
        """The pages that each segment's policy never evicts, in order; 0 behind. -> [n, P]"""
        held = {one: self.engine.planner(one).held for one in np.unique(segments.choice).tolist()}
        width = max(map(len, held.values())) + 1
        table = np.zeros((max(held) + 1, width), np.int64)
        for one, pages in held.items():
            table[one, : len(pages)] = pages
        chosen = self._tensor(table)[self._tensor(segments.choice)[:, None]]  # [n, 1, width]
        return chosen[:, 0].gather(1, column.clamp(max=width - 1).expand(len(segments.row), -1))

    def _tokens_of(self, pages: Tensor) -> Tensor:
        """pages [n, P] -> their tokens' slots [n, P * S] int64"""
        offset = torch.arange(self.page_size, device=pages.device)
        return (pages.long()[:, :, None] * self.page_size + offset).flatten(1)

    def _tensor(self, values: NDArray[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(values).to(self.req_to_token.device, dtype, non_blocking=True)
