"""A step planned on the host: what each query of the batch reads, in the stock backend's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvplug import (
    BatchPlanner,
    Blocks,
    BlockSelector,
    HeadBudgets,
    LayerReads,
    Observed,
    PositionalPrefill,
    Rotation,
    Segments,
    Selector,
    blocks_of,
    dense_reads,
    reads_by_policy,
)
from kvplug.policy import Positions
from kvplug.segments import SINKS
from kvplug_vllm import compat
from kvplug_vllm.announce import announce
from kvplug_vllm.cache import planned_layers
from kvplug_vllm.compression import Compression, Packing
from kvplug_vllm.metrics import Metrics
from kvplug_vllm.router import OWN, UNKNOWN, Router, Rows
from kvplug_vllm.settings import Engine, Taken

PAGES_AT_ONCE = 256
"""That are taken, in each layer: they are copied out of the cache and back."""


@dataclass
class Placed:
    """What a selection asks of pages on the host (``kvplug.placement``)."""

    digests: Tensor
    """Of each page that a query sees, where it lies among the cache's. [Q, P] int32"""
    hot: int
    """Pages, the first that the page table names of a request with pages on the host."""
    away: Tensor
    """Pages on the host; 0 of other requests. [Q] int32"""
    behind: Tensor
    """Where the page table goes on behind them. [Q] int32"""
    later: Sequence[Selected] = ()
    """Queries that come once these have been read: others of their requests."""


@dataclass
class Selected:
    """The queries of a step that read one policy's selection; Q of them, or Q blocks of them,
    [Q] int32 unless said."""

    selector: Selector | BlockSelector
    blocks: Blocks | None
    """None for single queries."""
    tokens: Tensor | None
    """Rows of the flat queries; None for the first ones."""
    among: Tensor | None
    """Which of them select, where a step of fixed shapes has others; the rest have no pages."""
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
    metadata: Any
    """Stock metadata of the Q * H virtual sequences, for layers of the selector's own budget; None
    where the stock kernel reads no such units."""
    rebuild: Callable[[Tensor, Tensor], Any]
    """(block table, lengths) of the virtual sequences -> stock metadata, for the others."""
    open: Tensor | None = None
    """Where pages are kept in a format, the newest of each among the plain ones. [Q]"""
    placed: Placed | None = None
    """Where prompts go to the host."""


@dataclass
class ByHead:
    """The queries of a step that read all they see where KV heads keep different numbers of pages;
    n sequences of them for each head."""

    tokens: Tensor | None
    """Rows of the flat queries; None for the first ones."""
    order: Tensor | None
    """The sequences' queries (``Segments.by_head``); None where each is of one."""
    page_table: Tensor  # [n, P] int32
    kept: Tensor
    """Private pages, the first of those. [n] int32"""
    pages: Tensor
    """Head pages of each head in them. [n, H] int32"""
    width: int
    """Pages that a sequence reads, at most."""
    metadata: Any
    """Stock metadata of the sequences."""
    first: int
    """The layer that makes the sequences' tables for all whose heads are of these kinds, in the
    graph that is replayed too."""


@dataclass
class Whole:
    """The queries of a step that read all they see, in the stock backend's terms."""

    tokens: Tensor | None
    metadata: Any
    """None where there are none but those of ``by_head``."""
    by_head: ByHead | None = None


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
    observations: Sequence[tuple[int, Observed]] = ()
    """By the stay of their request."""
    resumed: tuple[Tensor, Tensor] | None = None
    """Pages that decoding goes on in, whose digests may know drafts that were rejected: their
    blocks [n], and slots [n, S], in order, of all that is theirs now; -1 for the rest. int64"""
    replayed: bool = False
    """No Python of the step runs: what it computes for later ones must be left in memory."""
    writes: Any = None
    """What the layers write themselves, where pages are kept in a format (``coded.Writes``)."""


class PlannedBuilder:
    """Before a stock AttentionMetadataBuilder in the bases."""

    stock: ClassVar[Any]
    coded: ClassVar[bool] = False
    """Whether pages are kept in a format: every step is planned, the stock kernel reads none."""
    supports_update_block_table = False  # a plan belongs to its block table
    vllm_config: Any
    layer_names: list[str]
    device: torch.device
    most_replayed = 0
    """Requests of a decode step that a CUDA graph may replay, padded ones included."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        engine = Engine.enter(vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        planned = [name for name in layer_names if context[name].impl.planned]
        self.offer, policy = engine.offer, engine.settings.policy
        self.dense = not policy.plans and not self.offer.mixed
        """Every step is the engine's own."""
        self.packs = policy.packs or self.offer.mixed
        """Whether rows may hold private blocks."""
        hides = policy.eviction is not None or isinstance(policy.generate, PositionalPrefill)
        self.rewrites = self.packs or hides or policy.reuse is not None
        """Whether queries may see other pages than their request's first."""
        self.reuses = policy.reuse is not None
        """Whether requests may take chunks from elsewhere in the cache."""
        self.kv_heads = kv_cache_spec.num_kv_heads
        self.layers = [compat.layer_index(name) for name in planned]
        self.kinds: dict[tuple[bool, ...], int] = {}
        """Of layers whose KV heads keep different numbers of pages, and the first such layer."""
        for layer in self.layers:
            kinds = policy.scored.kinds(layer) if policy.scored is not None else None
            if kinds is not None:
                self.kinds.setdefault(kinds, layer)
        self.max_tokens = vllm_config.model_config.max_model_len
        self.planner = BatchPlanner(
            kv_cache_spec.block_size, getattr(kv_cache_spec, "budget", None)
        )
        self.planner.know([engine.settings])
        self.second: Any = compat.second_builder(self)
        self.single: Any = None
        self.fixed = False
        """Whether the step that is planned may be replayed: it must keep its shapes."""
        self.capturing = False
        self.resumed_page = 0
        """Tokens of pages whose digests keep what the next step writes over, a draft's key; 0
        where there are no drafts, or none is kept."""
        self.behind: list[Packing] = []
        """What is to be packed behind a step that may have been replayed: before the next one."""
        self.unseen: list[tuple[int, Observed]] = []
        """Of a step that may have been replayed: the next one takes them from memory."""
        self.selected_queries = dict.fromkeys(self.layers, 0)
        """Queries that decode and went through a selection, by layer, for tests and doctor."""
        self.selected_blocks = 0
        """Blocks of prompts' queries that did, in every layer."""
        self.metrics = None
        if planned:
            self.impl: Any = context[planned[0]].impl
            digest, size = self.offer.digest, kv_cache_spec.block_size
            if vllm_config.speculative_config is not None and digest and digest.accumulates:
                pages, _ = self.offer.digest_rows(size, kv_cache_spec.dtype.itemsize)
                self.resumed_page = size // pages
            if self.reuses:
                text = vllm_config.model_config.hf_text_config
                self.rotation = Rotation.of(text, self.impl.head_size)
            self.single = compat.single_head_builder(self, self.impl.num_queries_per_kv)
            share = len(planned) / len(planned_layers(vllm_config))
            self.metrics = Metrics.of(engine, share, self.layers, kv_cache_spec)
        tensor = partial(self._tensor, dtype=torch.int64)
        self.compression = Compression(
            self.planner, tensor, vllm_config, planned, self.metrics, tuple(self.kinds)
        )
        if self.metrics is not None:
            announce(engine, self.planner.planners[OWN], kv_cache_spec)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.kvplug = None
        if self.layers and self.dense:
            self._count_dense(common_attn_metadata)
        elif self.layers:
            metadata.kvplug = self.plan_step(common_attn_metadata, metadata)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        self.capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self.capturing = False

    def plan_step(self, common: Any, metadata: Any) -> StepPlan | None:
        """None where the engine's own path serves the whole step."""
        planner = self.planner
        Router.check_named(self.vllm_config, common)
        rows = Router.rows(self.vllm_config, common)
        planner.know(rows.settings)
        # Rows of no request (warm-up, graph capture): single queries are decodes.
        decodes = (rows.total - rows.computed == 1) & (not self.packs)
        unknown = np.where(decodes, rows.computed, rows.total)
        prompt = np.where(rows.prompt == UNKNOWN, unknown, rows.prompt)
        batch = rows.choice, rows.computed, rows.total, prompt
        if self.reuses:
            self._take(Router.to_take(self.vllm_config))
            self._move(common, *planner.moved(*batch))
        segments = planner.plan(*batch)
        self._count(segments, rows)
        self.compression.observe(self.unseen)
        self.unseen = []
        self.compression.pack_now(self.behind)
        self.behind = []
        self.fixed = common.max_query_len == 1 and common.num_reqs <= self.most_replayed
        observations = self.compression.observations(rows, planner.observed(*batch))
        events = self.compression.ended(planner.events(*batch), rows, prompt)
        if self.fixed:
            self.unseen, observations = observations, []
        elif (
            segments.untouched
            and not (events or self.coded)
            and planner.planners[OWN].settings.shortcut
        ):
            resumed = self._resumed(common, rows)
            if not observations and resumed is None:
                return None
            served = Phase((), dict.fromkeys(self.layers))
            return StepPlan([served], observations, resumed)
        if self.packs:
            self.compression.redirect(common, segments)
        packings = self.compression.packings(common, events, rows, prompt)
        writes = self.writes(common, rows)
        if self.fixed:
            self.behind = [each for each in packings if each.event.phase]
            self.compression.pack_now([each for each in packings if not each.event.phase])
            packings = []
        whole = partial(self._whole, common, metadata, segments)
        selected = partial(self._selected, common)
        fixed = common.num_reqs if self.fixed else None
        phases = []
        last = max([0, *segments.phase.tolist(), *(each.event.phase for each in packings)])
        for number in range(last + 1):
            part = segments.where(segments.phase == number)
            layers = planner.by_layer(part, self.layers, whole, selected, fixed)
            mine = [packing for packing in packings if packing.event.phase == number]
            phases.append(Phase(mine, layers))
        resumed = self._resumed(common, rows)
        return StepPlan(phases, observations, resumed, self.fixed, writes)

    def writes(self, common: Any, rows: Rows) -> Any:
        """What layers write themselves; None where vLLM asks them to."""
        return None

    def _take(self, taken: Sequence[Taken]) -> None:
        """In all layers, before anything of the step runs: what it computes may go to blocks that
        others took from, and a graph that replays it runs no Python."""
        if not taken:
            return
        sources, into, shifts = (
            np.array([n for each in taken for n in getattr(each, name)], np.int64)
            for name in ("sources", "into", "shifts")
        )
        context = self.vllm_config.compilation_config.static_forward_context
        for part, *angles in self.rotation.in_parts(shifts, PAGES_AT_ONCE):
            cosines, sines = (self._tensor(each.numpy(), torch.float32) for each in angles)
            given = [self._tensor(each[part], torch.int64) for each in (sources, into)]
            for name in self.compression.layer_names:
                layer = context[name]
                layer.impl.take_pages(layer, layer.kv_cache, *given, cosines, sines)

    def _move(self, common: Any, tokens: Positions, stands: Positions) -> None:
        """Tell the model where tokens stand that lie elsewhere. In place: it reads the positions
        that vLLM keeps, once where the tokens go has been computed from them."""
        if len(tokens):
            assert common.positions is not None, "this model runner shows no positions"
            where = self._tensor(tokens, torch.int64)
            common.positions[where] = self._tensor(stands, common.positions.dtype)

    def _resumed(self, common: Any, rows: Rows) -> tuple[Tensor, Tensor] | None:
        """Where this step decodes into pages that earlier ones may have written drafts to."""
        size, page = self.planner.page_size, self.resumed_page
        if not page:
            return None
        row, first, held = self.planner.begun(rows.computed, rows.total, rows.prompt, page)
        known = rows.known[row]
        if not known.any():
            return None
        first, held = first[known], held[known]
        slots = common.slot_mapping[self._tensor(first, torch.int64)].long()
        offset = torch.arange(size, device=slots.device)
        begin = slots % size // page * page
        inside = (offset >= begin[:, None]) & (
            offset < (begin + self._tensor(held, torch.int64))[:, None]
        )
        blocks = slots // size
        return blocks, torch.where(inside, blocks[:, None] * size + offset, -1)

    def _count(self, segments: Segments, rows: Rows) -> None:
        if self.capturing:
            return
        segments = segments.where(rows.known[segments.row])
        self.selected_blocks += int((segments.selects & ~segments.decodes).sum())
        decoding = segments.where(segments.selects & segments.decodes)
        for choice, part in decoding.by_choice().items():
            for layer in self.layers:
                if self.planner.planners[choice].layer_budget(layer) is not None:
                    self.selected_queries[layer] += len(part.row)
        if self.metrics is not None:
            counted = reads_by_policy(segments, self.planner.planners, self.layers)
            for settings, reads in counted:
                self.metrics.count(reads, settings)

    def _count_dense(self, common: Any) -> None:
        """All that a dense server costs in a step: no plan, and nothing on the device."""
        if self.metrics is None or self.capturing:
            return
        rows = Router.rows(self.vllm_config, common)
        known = rows.known
        reads = dense_reads(rows.computed[known], rows.total[known], rows.prompt[known])
        self.metrics.count(reads, rows.settings[OWN])

    def _tensor(self, values: NDArray[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        """A planned array on the device, for this step."""
        return torch.from_numpy(values).to(dtype)

    def _lasting(
        self, name: str, values: NDArray[Any] | Tensor, each: int = 1, more: int = 0,
        columns: int | None = None,
    ) -> Tensor:  # fmt: skip
        """What a layer of this step reads, int32 on the device, where a graph that was captured
        finds it.

        name: its one purpose in a step. Of n requests it has n * each + more rows, and at most so
        many columns.
        """
        return self._tensor(values) if isinstance(values, np.ndarray) else values

    def _tokens(self, segments: Segments) -> Tensor:
        """Flat query rows of the segments, in their order."""
        return self._tensor(segments.flat, torch.int64)

    def _table(self, common: Any, segments: Segments, name: str) -> Tensor:
        """Pages that each segment sees, in order, as the engine numbers them. -> [n, P] int32

        Freed pages leave stale ids in the engine's table: they are skipped, never read.
        """
        table = common.block_table_tensor
        rows, most = segments.row, table.shape[1]
        in_order = len(rows) == len(table) and (rows == np.arange(len(rows))).all()
        if not in_order:
            table = table[self._tensor(rows, torch.int64)]
        if not self.rewrites:
            return table
        column = torch.arange(int(segments.columns.max(initial=1)), device=table.device)[None]
        kept = self._tensor(segments.kept, torch.int64)[:, None]
        first = self._tensor(segments.first, torch.int64)[:, None]
        held = self.planner.planners[OWN].held_pages(int(segments.kept.max(initial=0)))
        held = np.append(held, 0)
        start = self._tensor(held, torch.int64)[column.clamp(max=len(held) - 1)]
        packed = self._tensor(segments.packed, torch.int64)[:, None]
        page = column - kept + first
        page = torch.where((packed >= 0) & (page >= packed), page + kept, page)
        start = torch.where(packed >= 0, packed + column, start)
        start = torch.where(packed == SINKS, column, start)
        page = torch.where(column < kept, start, page)
        table = table.gather(1, page.clamp(max=most - 1))
        return self._lasting(f"{name}.table", table, columns=most)

    def _whole(
        self,
        common: Any,
        metadata: Any,
        segments: Segments,
        rest: Segments,
        select: tuple[tuple[int, bool], ...],
        kinds: tuple[bool, ...] | None = None,
    ) -> Whole:
        """rest: those of a step's segments that layers read whole in which the (choice, decodes)
        ``select`` read a selection, and whose KV heads are of these kinds."""
        if kinds is not None:
            behind = (rest.packed >= 0) | self.fixed
            if behind.any():
                by_head = self._by_head(common, rest.where(behind), kinds)
                if behind.all():
                    return Whole(None, None, by_head)
                others = self._whole(common, metadata, segments, rest.where(~behind), select)
                return replace(others, by_head=by_head)
        everything = not select if self.fixed else len(rest.row) == len(segments.row)
        if everything and not self.rewrites:
            return Whole(None, metadata)
        name = "rest" if select else "whole"
        queries = np.ones_like(rest.row) if self.fixed else rest.queries
        bounds = np.zeros(len(rest.row) + 1, np.int64)
        bounds[1:] = np.cumsum(queries)
        sequences = self._common(
            common,
            bounds,
            self._lasting(f"{name}.bounds", bounds, more=1),
            self._lasting(f"{name}.lengths", rest.visible),
            self._table(common, rest, name),
            longest=self.max_tokens if self.fixed else int(rest.visible.max(initial=1)),
        )
        tokens = None if everything or self.fixed else self._tokens(rest)
        return Whole(tokens, self.stock.build(self.second, 0, sequences))

    def _by_head(self, common: Any, part: Segments, kinds: tuple[bool, ...]) -> ByHead:
        planner, heads = self.planner.planners[OWN], self.kv_heads
        scored, size = planner.scored, planner.page_size
        assert isinstance(scored, HeadBudgets)
        name = f"heads of {self.kinds[kinds]}"
        pages = scored.head_pages(kinds, part.kept, part.first, size)  # [n, H]
        lengths = np.maximum(part.stop - part.first * size, 0)[:, None] + pages * size
        queries = np.ones_like(part.row) if self.fixed else part.queries
        bounds = np.append(0, np.cumsum(np.repeat(queries, heads)))
        longest = self.max_tokens if self.fixed else int(lengths.max())
        width = -(-longest // size)
        sequences = self._common(
            common,
            bounds,
            self._lasting(f"{name}.bounds", bounds, each=heads, more=1),
            self._lasting(f"{name}.lengths", lengths.flatten(), each=heads),
            common.block_table_tensor.new_zeros(len(bounds) - 1, width),
            longest,
        )
        flat = part.token if self.fixed else part.flat
        in_order = (flat == np.arange(len(flat))).all()
        single = (queries == 1).all()
        return ByHead(
            tokens=None if in_order else self._tensor(flat, torch.int64),
            order=None if single else self._tensor(part.by_head(heads), torch.int64),
            page_table=self._table(common, part, name),
            kept=self._lasting(f"{name}.kept", part.kept),
            pages=self._lasting(f"{name}.pages", pages, columns=heads),
            width=width,
            metadata=self._of_heads(sequences),
            first=self.kinds[kinds],
        )

    def _of_heads(self, sequences: Any) -> Any:
        """Stock metadata of sequences of one KV head each."""
        return self.stock.build(self.single, 0, sequences)

    def _common(
        self, common: Any, bounds: NDArray[np.int64], starts: Tensor, lengths: Tensor,
        table: Tensor, longest: int,
    ) -> Any:  # fmt: skip
        """The step's metadata for other sequences over the same cache. starts: the bounds, on
        the device."""
        return replace(
            common,
            num_reqs=len(bounds) - 1,
            num_actual_tokens=int(bounds[-1]),
            query_start_loc=starts,
            query_start_loc_cpu=torch.from_numpy(bounds).to(torch.int32),
            max_query_len=int(np.diff(bounds).max(initial=1)),
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=None,
            max_seq_len=longest,
            block_table_tensor=table.contiguous(),
            positions=None,
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _selected(self, common: Any, segments: Segments) -> Selected:
        """segments: of one choice, single queries that decode or blocks of prompts."""
        planner = self.planner.planners[int(segments.choice[0])]
        decodes = self.fixed or bool(segments.decodes[0])
        selector = planner.chooser(decodes)
        assert selector is not None
        page, unit = planner.grain(decodes)
        lengths, keep = segments.visible, planner.selection(segments)
        width = int(keep.max(initial=1))
        if self.fixed:
            width = planner.width(self.max_tokens, short=False)
        reads = np.maximum(lengths - (-(-lengths // unit) - keep) * unit, 0)
        heads = self.kv_heads
        queries = np.ones_like(lengths) if self.fixed else segments.queries
        bounds = np.append(0, np.cumsum(np.repeat(queries, heads)))
        starts = self._lasting("selected.bounds", bounds, each=heads, more=1)

        def build(table: Tensor, lengths: Tensor) -> Any:
            virtual = self._common(common, bounds, starts, lengths, table, width * unit)
            return self._of_heads(virtual)

        metadata = None
        if self.impl.reads_units(unit, planner.page_size):
            metadata = build(
                common.block_table_tensor.new_zeros(len(reads) * heads, width),
                self._lasting("selected.reads", np.repeat(reads, heads), each=heads),
            )
        table = self._table(common, segments, "selected")
        if not decodes:
            table = table[:, : int(segments.pages.max())].contiguous()
        flat = segments.token if self.fixed else segments.flat
        in_order = (flat == np.arange(len(flat))).all()
        return Selected(
            selector=selector,
            blocks=None if decodes else blocks_of(planner, segments, heads, self._tensor),
            tokens=None if in_order else self._tensor(flat, torch.int64),
            among=self._lasting("selected.among", segments.selects) if self.fixed else None,
            page_table=table,
            pages=self._lasting("selected.pages", -(-lengths // page)),
            keep={
                budget: self._lasting(
                    f"selected.keep {budget}", planner.selection(segments, budget)
                )
                for budget in selector.budgets(self.layers)
            },
            lengths=self._lasting("selected.lengths", lengths),
            page=page,
            unit=unit,
            width=width,
            metadata=metadata,
            rebuild=self._rebuilder(metadata, build),
        )

    def _rebuilder(
        self, metadata: Any, build: Callable[[Tensor, Tensor], Any]
    ) -> Callable[[Tensor, Tensor], Any]:
        """For layers whose lengths are known only once they have selected."""
        return build
