"""A step planned on the host: what each query of the batch reads, in the stock backend's terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvplug import BatchPlanner, Observed, Segments, Selector, Settings, reads_by_policy
from kvplug_vllm import compat
from kvplug_vllm.announce import announce
from kvplug_vllm.cache import planned_layers
from kvplug_vllm.metrics import Metrics
from kvplug_vllm.metrics import packing as packing_time
from kvplug_vllm.router import OWN, UNKNOWN, Router
from kvplug_vllm.settings import Engine


@dataclass
class Selected:
    """The queries of a step that read one policy's selection; Q of them, [Q] int32 unless said."""

    selector: Selector
    choice: int
    tokens: Tensor | None
    """Rows of the flat queries; None for the first Q."""
    page_table: Tensor  # [Q, P]
    pages: Tensor
    keep: dict[int, Tensor]
    """By a layer's budget."""
    lengths: Tensor
    width: int
    metadata: Any
    """Stock metadata of the Q * H virtual sequences, for layers of the selector's own budget."""
    rebuild: Callable[[Tensor, Tensor], Any]
    """(block table, lengths) of the virtual sequences -> stock metadata, for the others."""


@dataclass
class Whole:
    """The queries of a step that read all they see, in the stock backend's terms."""

    tokens: Tensor | None
    metadata: Any


@dataclass
class Packing:
    """Prompts of one policy whose kept tokens are packed in this step; J of them."""

    settings: Settings
    pages: Tensor
    """The prompt's pages, the partial last one too, in order. [J, P] int64"""
    lengths: Tensor  # [J] int64 prompt tokens
    keep: Tensor  # [J] int64 tokens kept
    width: int
    """The most tokens kept."""
    private: Tensor
    """The pages they are packed into, in order, the last one repeated. [J, Kp] int64"""
    slots: Tensor
    """Where kept token k of prompt j goes, and which they are: rows of [J * width]. [n] int64"""
    packed: Tensor  # [n] int64
    stays: list[int]

    def kept(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """What goes to ``slots``. rows [J, T, H, D], tokens [J, H, width] -> [n, H, D]"""
        index = tokens.transpose(1, 2)[..., None].expand(-1, -1, -1, rows.shape[-1])
        return rows.gather(1, index).flatten(0, 1)[self.packed]


@dataclass(frozen=True)
class Batch:
    """The requests of a step: which settings they have, and their tokens. [B] each"""

    choice: NDArray[np.int64]
    computed: NDArray[np.int64]
    total: NDArray[np.int64]
    prompt: NDArray[np.int64]


@dataclass
class Observation:
    stay: int
    """Of the request."""
    seen: Observed


@dataclass
class StepPlan:
    whole: dict[tuple[bool, ...], Whole | None]
    """The queries that read all they see, by which of ``selected`` apply to a layer."""
    selected: Sequence[Selected] = ()
    packings: Sequence[Packing] = ()
    observations: Sequence[Observation] = ()


class PlannedBuilder:
    """Before a stock AttentionMetadataBuilder in the bases."""

    stock: ClassVar[Any]
    supports_update_block_table = False  # a plan belongs to its block table
    vllm_config: Any
    layer_names: list[str]
    device: torch.device
    fixed_shapes = False
    """Whether decode steps must keep their shapes, because CUDA graphs replay them."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        engine = Engine.enter(vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        planned = [name for name in layer_names if context[name].impl.planned]
        self.offer, policy = engine.offer, engine.settings.policy
        self.planner = None
        self.packs = policy.scored is not None or self.offer.mixed
        """Whether rows may hold private blocks."""
        self.rewrites = self.packs or policy.eviction is not None
        self.kv_heads = kv_cache_spec.num_kv_heads
        self.single: Any = None
        self.metrics = None
        self.layers = [compat.layer_index(name) for name in planned]
        self.max_tokens = vllm_config.model_config.max_model_len
        if not planned:
            return
        self.planner = BatchPlanner(
            kv_cache_spec.block_size, getattr(kv_cache_spec, "budget", None)
        )
        self.planner.know([engine.settings])
        group = context[planned[0]].impl.num_queries_per_kv
        self.single = compat.single_head_builder(self, group)
        self.metrics = Metrics.of(engine, len(planned) / len(planned_layers(vllm_config)))
        if self.metrics is not None:
            announce(self.offer, self.planner.planners[OWN], kv_cache_spec, vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.kvplug = self.plan_step(common_attn_metadata, metadata) if self.planner else None
        return metadata

    def plan_step(self, common: Any, metadata: Any) -> StepPlan | None:
        """None where the engine's own path serves the whole step."""
        planner = self.planner
        assert planner is not None
        settings, choice = Router.chosen(self.vllm_config, common)
        planner.know(settings)
        bounds = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        total = compat.host_lengths(common)
        computed = total - np.diff(bounds)
        prompt = Router.prompts(self.vllm_config, common)
        # Rows of no request (warm-up, graph capture): single queries are decodes.
        decodes = (total - computed == 1) & (not self.packs)
        prompt = np.where(prompt == UNKNOWN, np.where(decodes, computed, total), prompt)
        batch = Batch(choice, computed, total, prompt)
        segments = planner.plan(choice, computed, total, prompt)
        self._count(segments)
        fixed = self.fixed_shapes and common.max_query_len == 1
        observations = self._observations(common, batch)
        if fixed and not settings[OWN].policy.is_dense:
            own = planner.planners[OWN]
            segments = segments.one_per_row(common.num_reqs, own.selector is not None)
        elif segments.untouched and planner.planners[OWN].settings.shortcut:
            if not observations:
                return None
            return StepPlan({(): Whole(None, metadata)}, observations=observations)
        if self.packs:
            self._redirect(common, segments)
        packings = self._packings(common, batch)
        if fixed:
            self._pack_now(packings)
            packings = []
        plan = StepPlan({}, packings=packings, observations=observations)
        plan.selected = [
            self._selected(common, each)
            for each in segments.where(segments.selects).by_choice().values()
        ]
        selects = {
            tuple(each.selector.layer_budget(layer) is not None for each in plan.selected)
            for layer in self.layers
        }
        for applies in selects:
            plan.whole[applies] = self._rest(common, segments, metadata, plan.selected, applies)
        return plan

    def _count(self, segments: Segments) -> None:
        if self.metrics is not None:
            assert self.planner is not None
            counted = reads_by_policy(segments, self.planner.planners, self.layers)
            for settings, reads in counted:
                self.metrics.count(reads, settings)

    def _rest(
        self,
        common: Any,
        segments: Segments,
        metadata: Any,
        selected: Sequence[Selected],
        applies: tuple[bool, ...],
    ) -> Whole | None:
        """What a layer reads whole, where some selections apply to it and some do not."""
        if not any(applies):
            return Whole(None, self._whole(common, segments) if self.rewrites else metadata)
        elsewhere = segments.selects.copy()
        for each, applied in zip(selected, applies, strict=True):
            if not applied:
                elsewhere &= segments.choice != each.choice
        rest = segments.where(~elsewhere)
        return Whole(self._tokens(rest), self._whole(common, rest)) if len(rest.row) else None

    def _redirect(self, common: Any, segments: Segments) -> None:
        """Private blocks push later blocks down the row: send new tokens where they belong.

        In place, because vLLM hands the same slots to the cache update.
        """
        behind = segments.where(segments.packed >= 0)
        if not len(behind.row):
            return
        queries = behind.queries
        segment = np.repeat(np.arange(len(queries)), queries)
        tokens = behind.flat
        position = tokens - behind.token[segment] + behind.start[segment]
        page = position // behind.page_size
        column = page + np.where(page >= behind.packed[segment], behind.kept[segment], 0)
        at = self._tensor("redirect.row", behind.row[segment], torch.int64)
        block = common.block_table_tensor[at, self._tensor("redirect.column", column, torch.int64)]
        offset = self._tensor("redirect.offset", position % behind.page_size, torch.int64)
        slots = block.to(torch.int64) * behind.page_size + offset
        common.slot_mapping[self._tensor("redirect.token", tokens, torch.int64)] = slots

    def _packings(self, common: Any, batch: Batch) -> list[Packing]:
        planner = self.planner
        assert planner is not None
        rows = planner.compresses(batch.choice, batch.computed, batch.total, batch.prompt)
        return [
            self._packing(common, batch, rows[batch.choice[rows] == one], one)
            for one in np.unique(batch.choice[rows]).tolist()
        ]

    def _packing(self, common: Any, batch: Batch, rows: NDArray[np.int64], choice: int) -> Packing:
        planner = self.planner.planners[choice]  # type: ignore[union-attr]
        size, prompt = planner.page_size, batch.prompt[rows]
        private = planner.private_pages(prompt)
        ends = -(-prompt // size)
        table = common.block_table_tensor[self._tensor("pack.row", rows, torch.int64)].long()
        columns = np.minimum(np.arange(int(ends.max()))[None], ends[:, None] - 1)
        places = ends[:, None] + np.minimum(np.arange(int(private.max())), private[:, None] - 1)
        blocks = table.gather(1, self._tensor("pack.private", places, torch.int64))
        keep, width = private * size, int(private.max()) * size
        if self.metrics is not None:
            self.metrics.count_packed(prompt, keep + prompt % size, planner.settings)
        packed = np.flatnonzero((np.arange(width)[None] < keep[:, None]).ravel())
        slots = (blocks[:, :, None] * size + torch.arange(size, device=blocks.device)).flatten()
        kept = self._tensor("pack.packed", packed, torch.int64)
        stays = Router.stays_of(self.vllm_config, common)
        return Packing(
            settings=planner.settings,
            pages=table.gather(1, self._tensor("pack.pages", columns, torch.int64)),
            lengths=self._tensor("pack.lengths", prompt, torch.int64),
            keep=self._tensor("pack.keep", keep, torch.int64),
            width=width,
            private=blocks,
            slots=slots[kept],
            packed=kept,
            stays=stays[rows].tolist(),
        )

    def _pack_now(self, packings: Sequence[Packing]) -> None:
        """In all layers, before a step that a CUDA graph may replay without running any Python.

        Nothing is missing: a single-token step passes the prompt's end with all of it cached.
        """
        context = self.vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            layer = context[name]
            if layer.impl.planned:
                for packing in packings:
                    with packing_time(Engine.current, packing.settings):
                        layer.impl.pack(layer, layer.kv_cache, packing)

    def _observations(self, common: Any, batch: Batch) -> list[Observation]:
        assert self.planner is not None
        seen = self.planner.observed(batch.choice, batch.computed, batch.total, batch.prompt)
        stays = Router.stays_of(self.vllm_config, common) if seen else ()
        return [Observation(int(stays[each.row]), each) for each in seen]

    def _tensor(self, name: str, values: NDArray[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        """A planned array on the device. ``name`` tells buffers apart where they are reused."""
        return torch.from_numpy(values).to(dtype)

    def _tokens(self, segments: Segments) -> Tensor:
        """Flat query rows of the segments, in their order."""
        return self._tensor("tokens", segments.flat, torch.int64)

    def _table(self, common: Any, segments: Segments, name: str) -> Tensor:
        """Pages that each segment sees, in order, as the engine numbers them. -> [n, P] int32

        Freed pages leave stale ids in the engine's table: they are skipped, never read.
        """
        table = common.block_table_tensor
        rows = segments.row
        in_order = len(rows) == len(table) and (rows == np.arange(len(rows))).all()
        if not in_order:
            table = table[self._tensor(f"{name}.row", rows, torch.int64)]
        if not self.rewrites:
            return table
        width = self._visible_width(segments, table.shape[1])
        column = torch.arange(width, device=table.device)[None]
        kept = self._tensor(f"{name}.kept", segments.kept, torch.int64)[:, None]
        first = self._tensor(f"{name}.first", segments.first, torch.int64)[:, None]
        held = np.append(self.planner.planners[OWN].held, 0)  # type: ignore[union-attr]
        start = self._tensor(f"{name}.held", held, torch.int64)[column.clamp(max=len(held) - 1)]
        packed = self._tensor(f"{name}.packed", segments.packed, torch.int64)[:, None]
        page = column - kept + first
        page = torch.where((packed >= 0) & (page >= packed), page + kept, page)
        start = torch.where(packed >= 0, packed + column, start)
        page = torch.where(column < kept, start, page)
        return table.gather(1, page.clamp(max=table.shape[1] - 1))

    def _visible_width(self, segments: Segments, widest: int) -> int:
        if self.fixed_shapes:
            return widest
        return int(segments.pages.max(initial=1))

    def _whole(self, common: Any, segments: Segments) -> Any:
        """Stock metadata for segments that read all they see."""
        bounds = np.zeros(len(segments.row) + 1, np.int64)
        bounds[1:] = np.cumsum(segments.queries)
        lengths = segments.visible
        return self.stock.build(
            self,
            0,
            self._common(
                common,
                bounds,
                self._tensor("whole.lengths", lengths),
                self._table(common, segments, "whole"),
                longest=int(lengths.max(initial=1)),
            ),
        )

    def _common(
        self, common: Any, bounds: NDArray[np.int64], lengths: Tensor, table: Tensor, longest: int
    ) -> Any:
        """The step's metadata for other sequences over the same cache."""
        return replace(
            common,
            num_reqs=len(bounds) - 1,
            num_actual_tokens=int(bounds[-1]),
            query_start_loc=self._tensor(f"bounds{len(bounds)}", bounds),
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
        choice = int(segments.choice[0])
        planner = self.planner.planners[choice]  # type: ignore[union-attr]
        assert planner.selector is not None
        pages, lengths, keep = segments.pages, segments.visible, planner.selection(segments)
        width = planner.width(self.max_tokens) if self.fixed_shapes else int(keep.max(initial=1))
        reads = np.maximum(lengths - (pages - keep) * planner.page_size, 0)
        heads = self.kv_heads
        in_order = (segments.token == np.arange(len(segments.token))).all()
        sequences = np.arange(len(reads) * heads + 1)

        def build(table: Tensor, lengths: Tensor) -> Any:
            virtual = self._common(common, sequences, lengths, table, width * planner.page_size)
            return self.stock.build(self.single, 0, virtual)

        metadata = build(
            common.block_table_tensor.new_zeros(len(reads) * heads, width),
            self._tensor("reads", np.repeat(reads, heads)),
        )
        return Selected(
            selector=planner.selector,
            choice=choice,
            tokens=None if in_order else self._tokens(segments),
            page_table=self._table(common, segments, "selected"),
            pages=self._tensor("pages", pages),
            keep={
                budget: self._tensor(f"keep{budget}", planner.selection(segments, budget))
                for budget in planner.selector.budgets(self.layers)
            },
            lengths=self._tensor("lengths", lengths),
            width=width,
            metadata=metadata,
            rebuild=self._rebuilder(metadata, build),
        )

    def _rebuilder(
        self, metadata: Any, build: Callable[[Tensor, Tensor], Any]
    ) -> Callable[[Tensor, Tensor], Any]:
        """For layers whose lengths are known only once they have selected."""
        return build
