"""Mixins that put a policy between vLLM and its own stock attention backend.

The builder plans once per step on the host; the implementation runs once per layer on the
device. What a policy leaves untouched goes through the stock path as it came. Selected reads go
through the stock kernel too: page p of KV head h is the virtual page p * H + h of a cache with
one KV head, and each (request, KV head) a sequence of its own with a shorter block table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvplug import Planner, Segments, Selector, choose_pages, step_reads
from kvplug_kernels.virtual_heads import virtual_heads
from kvplug_vllm import NAME, compat
from kvplug_vllm.metrics import Metrics
from kvplug_vllm.refusals import refuse
from kvplug_vllm.router import UNKNOWN, Router
from kvplug_vllm.settings import Engine


@dataclass
class Selected:
    """The queries of a step that read a selection; Q of them, [Q] int32 unless said."""

    tokens: Tensor | None
    """Rows of the flat queries; None for the first Q."""
    page_table: Tensor  # [Q, P]
    pages: Tensor
    keep: Tensor
    lengths: Tensor
    width: int
    metadata: Any
    """Stock metadata of the Q * H virtual sequences, for layers that read exactly ``keep``."""
    rebuild: Callable[[Tensor, Tensor], Any]
    """(block table, lengths) of the virtual sequences -> stock metadata, for the others."""


@dataclass
class Whole:
    """The queries of a step that read all they see, in the stock backend's terms."""

    tokens: Tensor | None
    metadata: Any


@dataclass
class StepPlan:
    every: Whole
    """All queries: for layers that select nothing."""
    rest: Whole | None = None
    """For layers that select: the queries that do not."""
    selected: Selected | None = None


class PlannedBackend:
    """Before a stock AttentionBackend in the bases."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # head-major pages: a head's keys lie together

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        from kvplug_vllm.cache import customize_spec

        return customize_spec(super().customize_spec(spec))  # type: ignore[misc]


class PlannedBuilder:
    """Before a stock AttentionMetadataBuilder in the bases."""

    stock: ClassVar[Any]
    supports_update_block_table = False  # a plan belongs to its block table
    vllm_config: Any
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
        self.planner = Planner(engine.settings, kv_cache_spec.block_size) if planned else None
        self.kv_heads = kv_cache_spec.num_kv_heads
        self.single: Any = None
        self.metrics = None
        if planned:
            group = context[planned[0]].impl.num_queries_per_kv
            self.single = compat.single_head_builder(self, group)
            self.metrics = Metrics.for_engine(engine)
        policy = engine.settings.policy
        self.budgets = [
            policy.selector.layer_budget(compat.layer_index(name)) if policy.selector else None
            for name in planned
        ]
        self.max_tokens = vllm_config.model_config.max_model_len

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.kvplug = self.plan_step(common_attn_metadata, metadata) if self.planner else None
        return metadata

    def plan_step(self, common: Any, metadata: Any) -> StepPlan | None:
        """None where the engine's own path serves the whole step."""
        assert self.planner is not None
        policy = self.planner.settings.policy
        bounds = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        total = compat.host_lengths(common)
        computed = total - np.diff(bounds)
        prompt = Router.prompts(self.vllm_config, common)
        # Rows of no request (warm-up, graph capture): single queries are decodes.
        unrouted = np.where(total - computed == 1, computed, total)
        prompt = np.where(prompt == UNKNOWN, unrouted, prompt)
        segments = self.planner.plan(computed, total, prompt)
        if self.metrics is not None:
            self.metrics.count(step_reads(segments, self.planner, self.budgets))
        if self.fixed_shapes and common.max_query_len == 1 and not policy.is_dense:
            segments = self._fixed(segments, common.num_reqs)
        elif segments.untouched and self.planner.settings.shortcut:
            return None
        evicts = self.planner.eviction is not None
        every = Whole(None, self._whole(common, segments) if evicts else metadata)
        if not segments.selects.any():
            return StepPlan(every)
        rest = segments.where(~segments.selects)
        return StepPlan(
            every,
            rest=Whole(self._tokens(rest), self._whole(common, rest)) if len(rest.row) else None,
            selected=self._selected(common, segments.where(segments.selects)),
        )

    def _fixed(self, segments: Segments, rows: int) -> Segments:
        """One selecting query for each row of a decode batch, padding included."""
        fields = {}
        for name in ("start", "stop", "kept", "first"):
            fields[name] = np.zeros(rows, np.int64)
            fields[name][segments.row] = getattr(segments, name)
        selects = np.full(rows, self.planner.selector is not None)  # type: ignore[union-attr]
        index = np.arange(rows)
        return Segments(
            row=index,
            token=index,
            selects=selects,
            decodes=selects,
            page_size=segments.page_size,
            **fields,
        )

    def _tensor(self, name: str, values: NDArray[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        """A planned array on the device. ``name`` tells buffers apart where they are reused."""
        return torch.from_numpy(values).to(dtype)

    def _tokens(self, segments: Segments) -> Tensor:
        """Flat query rows of the segments, in their order."""
        queries = segments.queries
        ends = np.cumsum(queries)
        flat = np.arange(ends[-1]) - np.repeat(ends - queries - segments.token, queries)
        return self._tensor("tokens", flat, torch.int64)

    def _table(self, common: Any, segments: Segments, name: str) -> Tensor:
        """Pages that each segment sees, in order, as the engine numbers them. -> [n, P] int32

        Freed pages leave stale ids in the engine's table: they are skipped, never read.
        """
        table = common.block_table_tensor
        rows = segments.row
        in_order = len(rows) == len(table) and (rows == np.arange(len(rows))).all()
        if not in_order:
            table = table[self._tensor(f"{name}.row", rows, torch.int64)]
        if self.planner.eviction is None:  # type: ignore[union-attr]
            return table
        width = self._visible_width(segments, table.shape[1])
        column = torch.arange(width, device=table.device)[None]
        kept = self._tensor(f"{name}.kept", segments.kept, torch.int64)[:, None]
        first = self._tensor(f"{name}.first", segments.first, torch.int64)[:, None]
        held = np.append(self.planner.held, 0)  # type: ignore[union-attr]
        start = self._tensor(f"{name}.held", held, torch.int64)[column.clamp(max=len(held) - 1)]
        page = torch.where(column < kept, start, column - kept + first)
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
        planner = self.planner
        assert planner is not None
        pages, lengths = segments.pages, segments.visible
        if self.fixed_shapes:
            short = segments.stop <= planner.settings.min_context
            width = planner.width(self.max_tokens)
            keep = np.minimum(np.where(short, pages, planner.keep), pages)
        else:
            keep = np.minimum(planner.keep, pages)
            width = int(keep.max(initial=1))
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
            tokens=None if in_order else self._tokens(segments),
            page_table=self._table(common, segments, "selected"),
            pages=self._tensor("pages", pages),
            keep=self._tensor("keep", keep),
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


class PlannedImpl:
    """Before a stock AttentionImpl in the bases."""

    stock: ClassVar[Any]
    supports_dcp = False
    supports_pcp = False
    num_heads: int
    num_kv_heads: int
    num_queries_per_kv: int
    head_size: int
    scale: float
    sliding_window: Any
    attn_type: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        if Engine.current is None or Engine.current.vllm_config is not vllm_config:
            refuse(vllm_config)
        engine = Engine.enter(vllm_config)
        policy = engine.settings.policy
        windowed = self.sliding_window not in (None, -1, (-1, -1))
        self.planned = self.attn_type == AttentionType.DECODER and not windowed
        """Windowed layers stay on the stock path; the policy plans the global ones."""
        self.selector: Selector | None = policy.selector if self.planned else None
        if self.selector is not None and getattr(self, "alibi_slopes", None) is not None:
            raise ValueError(
                f"{self.selector.name} cannot serve a model with ALiBi: its bias depends on "
                "positions that a selection does not keep; use the policy 'dense'"
            )
        self.selected_queries = 0
        """Queries that went through a selection here, for tests and doctor."""
        self._single: Any = None
        self._budget: int | None = None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        if self.selector is not None and self.selector.digest is not None:
            digest = self.selector.digest
            tail = compat.page_tail(kv_cache, digest.rows, self.head_size)
            digest.update(tail, key, slot_mapping, kv_cache.shape[2])

    def fused_rope_kvcache_supported(self) -> bool:
        return False  # it writes keys past do_kv_cache_update, and with them past the digests

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        plan: StepPlan | None = getattr(attn_metadata, "kvplug", None) if self.planned else None
        if plan is None:
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if plan.selected is None or not self._selects(layer):
            self._whole(layer, query, kv_cache, plan.every, output)
            return output
        if plan.rest is not None:
            self._whole(layer, query, kv_cache, plan.rest, output)
        self._selected(layer, query, kv_cache, plan.selected, output)
        return output

    def _selects(self, layer: Any) -> bool:
        if self._single is None:
            self._single = compat.single_head_impl(self)
            index = compat.layer_index(layer.layer_name)
            self._budget = self.selector.layer_budget(index) if self.selector else None
        return self._budget is not None

    def _whole(
        self, layer: Any, query: Tensor, kv_cache: Tensor, whole: Whole, output: Tensor
    ) -> None:
        tokens = whole.tokens
        if tokens is None:
            super().forward(layer, query, None, None, kv_cache, whole.metadata, output)  # type: ignore[misc]
            return
        out = output.new_empty(len(tokens), *output.shape[1:])
        super().forward(layer, query[tokens], None, None, kv_cache, whole.metadata, out)  # type: ignore[misc]
        output.index_copy_(0, tokens, out)

    def _selected(
        self, layer: Any, query: Tensor, kv_cache: Tensor, step: Selected, output: Tensor
    ) -> None:
        selector = self.selector
        assert selector is not None
        queries, size = len(step.lengths), kv_cache.shape[2]
        self.selected_queries += queries
        picked = query[:queries] if step.tokens is None else query[step.tokens]  # [Q, Hq, D]
        heads = picked.view(queries, self.num_kv_heads, self.num_queries_per_kv, -1)
        tail = None
        if selector.digest is not None:
            tail = compat.page_tail(kv_cache, selector.digest.rows, self.head_size)
        as_planned = self._budget == selector.budget
        keep = step.keep
        if not as_planned:
            keep = keep.clamp(max=selector.pages(size, self._budget))
        chosen, counts = choose_pages(
            selector, heads, tail, step.page_table, step.pages, keep,
            width=step.width, scale=self.scale,
        )  # fmt: skip
        cache, page_stride, head_stride = virtual_cache(kv_cache)
        table, lengths = virtual_heads(
            step.page_table, chosen, counts, step.lengths, size, page_stride, head_stride
        )
        if as_planned and selector.mass is None:
            metadata = step.metadata
            metadata.block_table = table
        else:
            metadata = step.rebuild(table, lengths)
        grouped = (queries * self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        in_place = step.tokens is None and output.is_contiguous()
        out = output[:queries].view(grouped) if in_place else output.new_empty(grouped)
        self.stock.forward(
            self._single, layer, heads.reshape(grouped), None, None, cache, metadata, out
        )
        if not in_place:
            rows = slice(0, queries) if step.tokens is None else step.tokens
            output[rows] = out.view(queries, *output.shape[1:])


def virtual_cache(kv_cache: Tensor) -> tuple[Tensor, int, int]:
    """[N, H, S, C] -> ([virtual pages, 1, S, C], page stride, head stride) over the same bytes.

    Page p of head h is virtual page p * page stride + h * head stride. Where pages are padded
    the page stride is no multiple of a head's bytes: virtual pages then overlap, one every
    greatest common divisor of the two.
    """
    pages, heads, size, width = kv_cache.shape
    page, head, _, _ = kv_cache.stride()
    unit = math.gcd(page, head)
    count = ((pages - 1) * page + (heads - 1) * head) // unit + 1
    assert count < 2**31, f"{count} virtual pages do not fit an int32 block table"
    view = kv_cache.as_strided(
        (count, 1, size, width), (unit, head, width, 1), kv_cache.storage_offset()
    )
    return view, page // unit, head // unit
