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

from kvplug import BatchPlanner, LayerReads, Observed, Segments, Selector, reads_by_policy
from kvplug_vllm import compat
from kvplug_vllm.announce import announce
from kvplug_vllm.cache import planned_layers
from kvplug_vllm.compression import Compression, Packing
from kvplug_vllm.metrics import Metrics
from kvplug_vllm.router import OWN, UNKNOWN, Router
from kvplug_vllm.settings import Engine


@dataclass
class Selected:
    """The queries of a step that read one policy's selection; Q of them, [Q] int32 unless said."""

    selector: Selector
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
class StepPlan:
    layers: Mapping[int, LayerReads[Whole, Selected] | None]
    """What each reads; None where the engine's own path serves it."""
    packings: Sequence[Packing] = ()
    observations: Sequence[tuple[int, Observed]] = ()
    """By the stay of their request."""


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
        self.packs = policy.scored is not None or self.offer.mixed
        """Whether rows may hold private blocks."""
        self.rewrites = self.packs or policy.eviction is not None
        self.kv_heads = kv_cache_spec.num_kv_heads
        self.layers = [compat.layer_index(name) for name in planned]
        self.max_tokens = vllm_config.model_config.max_model_len
        self.planner = BatchPlanner(
            kv_cache_spec.block_size, getattr(kv_cache_spec, "budget", None)
        )
        self.planner.know([engine.settings])
        self.single: Any = None
        self.metrics = None
        if planned:
            group = context[planned[0]].impl.num_queries_per_kv
            self.single = compat.single_head_builder(self, group)
            self.metrics = Metrics.of(engine, len(planned) / len(planned_layers(vllm_config)))
        tensor = partial(self._tensor, dtype=torch.int64)
        self.compression = Compression(self.planner, tensor, vllm_config, planned, self.metrics)
        if self.metrics is not None:
            announce(self.offer, self.planner.planners[OWN], kv_cache_spec, vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.kvplug = self.plan_step(common_attn_metadata, metadata) if self.layers else None
        return metadata

    def plan_step(self, common: Any, metadata: Any) -> StepPlan | None:
        """None where the engine's own path serves the whole step."""
        planner = self.planner
        settings, choice = Router.chosen(self.vllm_config, common)
        planner.know(settings)
        bounds = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        total = compat.host_lengths(common)
        computed = total - np.diff(bounds)
        prompt = Router.prompts(self.vllm_config, common)
        # Rows of no request (warm-up, graph capture): single queries are decodes.
        decodes = (total - computed == 1) & (not self.packs)
        prompt = np.where(prompt == UNKNOWN, np.where(decodes, computed, total), prompt)
        batch = choice, computed, total, prompt
        segments = planner.plan(*batch)
        self._count(segments)
        fixed = self.fixed_shapes and common.max_query_len == 1
        observations = self.compression.observations(common, planner.observed(*batch))
        if fixed and not settings[OWN].policy.is_dense:
            own = planner.planners[OWN]
            segments = segments.one_per_row(common.num_reqs, own.selector is not None)
        elif segments.untouched and planner.planners[OWN].settings.shortcut:
            if not observations:
                return None
            return StepPlan(dict.fromkeys(self.layers), observations=observations)
        if self.packs:
            self.compression.redirect(common, segments)
        packings = self.compression.packings(common, planner.compresses(*batch), choice, prompt)
        if fixed:
            self.compression.pack_now(packings)
            packings = []
        whole = partial(self._whole, common, metadata, segments)
        selected = partial(self._selected, common)
        layers = planner.by_layer(segments, self.layers, whole, selected)
        return StepPlan(layers, packings, observations)

    def _count(self, segments: Segments) -> None:
        if self.metrics is not None:
            counted = reads_by_policy(segments, self.planner.planners, self.layers)
            for settings, reads in counted:
                self.metrics.count(reads, settings)

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
        width = table.shape[1] if self.fixed_shapes else int(segments.pages.max(initial=1))
        column = torch.arange(width, device=table.device)[None]
        kept = self._tensor(f"{name}.kept", segments.kept, torch.int64)[:, None]
        first = self._tensor(f"{name}.first", segments.first, torch.int64)[:, None]
        held = np.append(self.planner.planners[OWN].held, 0)
        start = self._tensor(f"{name}.held", held, torch.int64)[column.clamp(max=len(held) - 1)]
        packed = self._tensor(f"{name}.packed", segments.packed, torch.int64)[:, None]
        page = column - kept + first
        page = torch.where((packed >= 0) & (page >= packed), page + kept, page)
        start = torch.where(packed >= 0, packed + column, start)
        page = torch.where(column < kept, start, page)
        return table.gather(1, page.clamp(max=table.shape[1] - 1))

    def _whole(self, common: Any, metadata: Any, segments: Segments, rest: Segments) -> Whole:
        """rest: those of a step's segments that some layers read whole."""
        everything = len(rest.row) == len(segments.row)
        if everything and not self.rewrites:
            return Whole(None, metadata)
        bounds = np.zeros(len(rest.row) + 1, np.int64)
        bounds[1:] = np.cumsum(rest.queries)
        sequences = self._common(
            common,
            bounds,
            self._tensor("whole.lengths", rest.visible),
            self._table(common, rest, "whole"),
            longest=int(rest.visible.max(initial=1)),
        )
        tokens = None if everything else self._tokens(rest)
        return Whole(tokens, self.stock.build(self, 0, sequences))

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
        planner = self.planner.planners[int(segments.choice[0])]
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
