"""A step planned on the host: what each query of the batch reads, in slots of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvplug import Planner, ScoredEviction, Segments, Selector, step_reads
from kvplug_sglang.metrics import Metrics
from kvplug_sglang.router import Router, Tenant

Numbers = NDArray[np.int64]


@dataclass
class Whole:
    """Runs of queries that read all they see: n sequences for the stock kernel."""

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
    """Queries of a prompt's window, kept until it is packed."""

    tenant: Tenant
    window: int
    tokens: slice
    """Rows of the flat queries."""
    offset: int
    """The first one's place in the window."""


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

    @property
    def prompt(self) -> Numbers:
        return np.array([tenant.prompt for tenant in self.tenants], np.int64)

    @property
    def first_token(self) -> Numbers:
        """Row of the flat queries where each request's begin. [B]"""
        queries = self.total - self.computed
        return np.cumsum(queries) - queries


class StepPlanner:
    """Turns batches into plans, for one engine."""

    def __init__(
        self,
        router: Router,
        req_to_token: Tensor,
        page_size: int,
        layers: range,
        metrics: Metrics | None = None,
    ) -> None:
        self.router = router
        self.req_to_token = req_to_token
        self.page_size = page_size
        self.layers = layers
        self.metrics = metrics

    def plan(self, batch: Batch) -> StepPlan | None:
        """None where the engine's own path serves the whole step and nothing is kept of it."""
        groups = list(self._groups(batch))
        observations = self._observations(batch)
        packings = [packing for group in groups if (packing := self._packing(batch, *group))]
        segments = [self._segments(batch, *group) for group in groups]
        for (planner, _), part in zip(groups, segments, strict=True):
            self._count(planner, part)
        untouched = all(
            part.untouched and planner.settings.shortcut
            for (planner, _), part in zip(groups, segments, strict=True)
        )
        if untouched:
            if not packings and not observations:
                return None
            return StepPlan(None, packings=packings, observations=observations)
        parts = [(planner, part) for (planner, _), part in zip(groups, segments, strict=True)]
        plan = StepPlan(
            self._whole(batch, parts), packings=packings, observations=observations
        )
        selecting = [(planner, part.where(part.selects)) for planner, part in parts]
        plan.selected = [
            self._selected(batch, planner, part) for planner, part in selecting if len(part.row)
        ]
        if plan.selected:
            rest = [(planner, part.where(~part.selects)) for planner, part in parts]
            if any(len(part.row) for _, part in rest):
                plan.rest = self._whole(batch, rest)
        return plan

    def _groups(self, batch: Batch) -> list[tuple[Planner, Numbers]]:
        """The batch's requests by policy."""
        rows: dict[Planner, list[int]] = {}
        for row, tenant in enumerate(batch.tenants):
            rows.setdefault(tenant.planner, []).append(row)
        return [(planner, np.array(each, np.int64)) for planner, each in rows.items()]

    def _segments(self, batch: Batch, planner: Planner, rows: Numbers) -> Segments:
        """Segments of some of the batch's requests, numbered as in the whole batch."""
        part = planner.plan(batch.computed[rows], batch.total[rows], batch.prompt[rows])
        row = rows[part.row]
        return Segments(
            row=row,
            token=batch.first_token[row] + part.start - batch.computed[row],
            start=part.start,
            stop=part.stop,
            kept=part.kept,
            first=part.first,
            packed=part.packed,
            selects=part.selects,
            decodes=part.decodes,
            page_size=part.page_size,
        )

    def _count(self, planner: Planner, segments: Segments) -> None:
        if self.metrics is not None and len(segments.row):
            selector = planner.selector
            budgets = [selector.layer_budget(i) if selector else None for i in self.layers]
            self.metrics.count(str(planner.settings.policy), step_reads(segments, planner, budgets))

    def _observations(self, batch: Batch) -> list[Observation]:
        seen = []
        first_token = batch.first_token
        for row, tenant in enumerate(batch.tenants):
            scored = tenant.planner.scored
            if scored is None or not scored.needs_queries or not self._compresses(tenant):
                continue
            begin = max(int(batch.computed[row]), tenant.prompt - scored.window, 0)
            end = min(int(batch.total[row]), tenant.prompt)
            if begin < end:
                token = int(first_token[row] - batch.computed[row])
                seen.append(
                    Observation(
                        tenant=tenant,
                        window=scored.window,
                        tokens=slice(token + begin, token + end),
                        offset=begin - tenant.prompt + scored.window,
                    )
                )
        return seen

    @staticmethod
    def _compresses(tenant: Tenant) -> bool:
        return bool(tenant.planner.private_pages(np.array([tenant.prompt]))[0])

    def _packing(self, batch: Batch, planner: Planner, rows: Numbers) -> Packing | None:
        """The requests among ``rows`` whose prompt's last token is computed in this step."""
        if planner.scored is None:
            return None
        prompts = batch.prompt[rows]
        ends = (batch.computed[rows] < prompts) & (prompts <= batch.total[rows])
        rows = rows[ends & (planner.private_pages(prompts) > 0)]
        if not len(rows):
            return None
        tenants = [batch.tenants[row] for row in rows]
        size = self.page_size
        prompt = batch.prompt[rows]
        private = np.array([tenant.private for tenant in tenants], np.int64)
        assert (private == planner.private_pages(prompt)).all(), "a prompt has no private pages"
        keep, width = private * size, int(private.max()) * size
        at = batch.rows[self._tensor(rows)]
        column = torch.arange(int(prompt.max()), device=self.req_to_token.device)
        slots = self.req_to_token[at[:, None], column].long()
        packed = np.flatnonzero((np.arange(width)[None] < keep[:, None]).ravel())
        index = self._tensor(packed)
        if self.metrics is not None:
            self.metrics.count_packed(str(planner.settings.policy), prompt, keep + prompt % size)
        return Packing(
            scored=planner.scored,
            protect=planner.settings.protect,
            tenants=tenants,
            slots=slots,
            lengths=self._tensor(prompt),
            keep=self._tensor(keep),
            width=width,
            targets=self._tokens_of(self.router.pages[at][:, : width // size]).flatten()[index],
            packed=index,
        )

    def _whole(self, batch: Batch, parts: list[tuple[Planner, Segments]]) -> Whole:
        """Sequences for the stock kernel, over the segments of every policy."""
        parts = [(planner, part) for planner, part in parts if len(part.row)]
        tables = [self._table(batch, planner, part) for planner, part in parts]
        width = max(table.shape[1] for table in tables)
        pages = torch.cat(
            [torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in tables]
        )
        lengths = np.concatenate([part.visible for _, part in parts])
        queries = np.concatenate([part.queries for _, part in parts])
        tokens = np.concatenate([_flat(part) for _, part in parts])
        in_order = len(tokens) == (batch.total - batch.computed).sum() and (
            (np.diff(tokens) == 1).all()
        )
        return Whole(
            tokens=None if in_order else self._tensor(tokens),
            slots=self._tokens_of(pages),
            lengths=self._tensor(lengths),
            queries=self._tensor(queries),
            longest_run=int(queries.max()),
        )

    def _selected(self, batch: Batch, planner: Planner, segments: Segments) -> Selected:
        assert planner.selector is not None
        pages = segments.pages
        keep = np.minimum(planner.keep, pages)
        return Selected(
            selector=planner.selector,
            tokens=self._tensor(segments.token),
            page_table=self._table(batch, planner, segments),
            pages=self._tensor(pages, torch.int32),
            keep=self._tensor(keep, torch.int32),
            lengths=self._tensor(segments.visible, torch.int32),
            width=int(keep.max()),
        )

    def _table(self, batch: Batch, planner: Planner, segments: Segments) -> Tensor:
        """Pages that each segment sees, in order, as the pool numbers them. -> [n, P] int32

        What stands in a request's row for pages it no longer has is skipped, never read.
        """
        device, size = self.req_to_token.device, self.page_size
        row = batch.rows[self._tensor(segments.row)][:, None]
        column = torch.arange(int(segments.pages.max()), device=device)[None]
        kept, first = self._tensor(segments.kept)[:, None], self._tensor(segments.first)[:, None]
        held = self._tensor(np.append(planner.held, 0))
        page = torch.where(
            column < kept,
            held[column.clamp(max=len(held) - 1)],
            column - kept + first,
        )
        token = (page * size).clamp(max=self.req_to_token.shape[1] - 1)
        pages = self.req_to_token[row, token] // size
        packed = self._tensor(segments.packed)[:, None] >= 0
        private = self.router.pages[row, column.clamp(max=self.router.pages.shape[1] - 1)]
        return torch.where(packed & (column < kept), private, pages)

    def _tokens_of(self, pages: Tensor) -> Tensor:
        """pages [n, P] -> their tokens' slots [n, P * S] int64"""
        offset = torch.arange(self.page_size, device=pages.device)
        return (pages.long()[:, :, None] * self.page_size + offset).flatten(1)

    def _tensor(self, values: NDArray[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(values).to(self.req_to_token.device, dtype, non_blocking=True)


def _flat(segments: Segments) -> Numbers:
    """Flat query rows of the segments, in their order."""
    queries = segments.queries
    ends = np.cumsum(queries)
    return np.arange(ends[-1]) - np.repeat(ends - queries - segments.token, queries)
