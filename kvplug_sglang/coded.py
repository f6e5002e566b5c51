"""Layers that keep their pages in a format: they write and read them without the stock kernel
(``kvplug.coded``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug import Segments, coded
from kvplug.coded import CodedReads, Gathered, OpenPages, Singles, Writes
from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.page_layout import PageLayout
from kvplug_sglang import compat
from kvplug_sglang.attention import PlannedAttention
from kvplug_sglang.coded_pool import CodedPool, open_pages
from kvplug_sglang.compression import Packing
from kvplug_sglang.step import Batch, Phase, Selected, StepPlan, StepPlanner


@dataclass
class CodedPlan(StepPlan):
    writes: Writes | None = None
    """What the layers write."""
    rows: Tensor | None = None
    """Where each request's open page is. [B, 1] int64"""


class CodedPlanner(StepPlanner):
    stock_serves = False
    writes: Writes

    def plan(self, batch: Batch) -> CodedPlan:
        self.writes = self._writes(batch)
        plan = super().plan(batch)
        assert plan is not None
        return CodedPlan(plan.phases, plan.observations, self.writes, batch.rows[:, None])

    def _writes(self, batch: Batch) -> Writes:
        if (batch.total - batch.computed == 1).all():
            return Writes.of_singles(batch.slots, batch.computed, self.page_size)
        return Writes.of(batch.slots, batch.computed, batch.total, self.page_size, self._tensor)

    def plan_singles(self, phases: Sequence[Phase], rows: Tensor, slots: Tensor) -> StepPlan:
        writes = Writes.of_singles(slots, np.zeros(len(rows), np.int64), self.page_size)
        return CodedPlan(phases, writes=writes, rows=rows[:, None])

    def whole_singles(self, table: Tensor, lengths: Tensor) -> Any:
        opened = self.open_singles(len(lengths))
        return CodedReads(Singles(None, opened, table, lengths), [])

    def open_singles(self, count: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=self.req_to_token.device)

    def _whole(self, batch: Batch, segments: Segments) -> Any:
        opened = self.writes.opened(segments)
        return CodedReads.of(segments, opened, self._table(batch, segments), self._tensor)

    def _selected(self, batch: Batch, segments: Segments) -> Selected:
        opened = self._tensor(self.writes.opened(segments), torch.int32)
        return replace(super()._selected(batch, segments), open=opened)


class CodedAttention(PlannedAttention):
    """Before a planned backend in the bases."""

    planner = CodedPlanner
    token_to_kv_pool: CodedPool
    _gathered: Gathered | None = None

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        pool, format = self.token_to_kv_pool, self.engine.offer.format
        assert isinstance(pool, CodedPool)
        assert format is not None
        self.open = open_pages(pool, len(self.req_to_token_pool.req_to_token))
        for layer in compat.attending(runner):
            for what, has in (
                ("layers that see a window", compat.window(layer)),
                ("cross-attention", layer.is_cross_attention),
                ("a soft cap of its logits", layer.logit_cap),
            ):
                if has:
                    raise ValueError(
                        f"kvplug: the model has {what}, beside which {format} was never run; "
                        f"leave {format.name} out"
                    )

    def _forward(self, *args: Any) -> Tensor:
        try:
            return super()._forward(*args)
        finally:
            self._gathered = None

    def codes(self, layer: Any) -> tuple[Tensor, PageLayout]:
        """Its pages' bytes, [N, H, page_bytes], and how they lie."""
        pool = self.token_to_kv_pool
        number = layer.layer_id - pool.start_layer
        return pool.codes[number], pool.layouts[number]

    def _digest(self, layer: Any) -> Tensor:
        cache, layout = self.codes(layer)
        return layout.keys(cache)

    def _write(
        self, layer: Any, forward_batch: Any, k: Tensor, v: Tensor, save: bool, plan: StepPlan
    ) -> None:
        assert save, "somebody else wrote to pages of codes"
        assert isinstance(plan, CodedPlan)
        assert plan.writes is not None
        assert plan.rows is not None
        cache, layout = self.codes(layer)
        shape = (-1, layer.tp_k_head_num, layout.head_size)
        beside = self.open[layer.layer_id - self.token_to_kv_pool.start_layer]
        self._gathered = coded.write(
            k.reshape(shape), v.reshape(shape), cache, layout, OpenPages(beside, plan.rows),
            plan.writes,
        )  # fmt: skip

    def _prompt(self, layer: Any, packing: Packing) -> tuple[Tensor, Tensor]:
        """A prompt's partial last page out of those that were gathered."""
        cache, layout = self.codes(layer)
        S, T = layout.page_size, len(packing.slots)
        pages = packing.slots[::S] // S
        keys, values = (each[0] for each in coded.tokens_of(cache, layout, pages[None]))
        if (own := T % S) and not packing.era:
            gathered, plan = self._gathered, self.plans[self.step_of[layer.layer_id]]
            assert gathered is not None
            assert isinstance(plan, CodedPlan)
            assert plan.writes is not None
            page = plan.writes.page_of(packing.row, T)
            keys[T - own : T] = gathered.keys[page, :own]
            values[T - own : T] = gathered.values[page, :own]
        return keys[:T], values[:T]

    def _store(self, layer: Any, packing: Packing, keys: Tensor, values: Tensor) -> None:
        cache, layout = self.codes(layer)
        size = layout.page_size
        coded.store(keys, values, cache, layout, packing.targets[::size] // size)

    def _whole(
        self, layer: Any, query: Tensor, whole: Any, output: Tensor, sinks: Tensor | None
    ) -> None:
        assert sinks is None
        assert self._gathered is not None
        coded.read(query, *self.codes(layer), self._gathered, whole, layer.scaling, output)

    def attend_heads(
        self, layer: Any, query: Tensor, step: Selected, chosen: Tensor, counts: Tensor,
        out: Tensor, sinks: Tensor | None,
    ) -> None:  # fmt: skip
        gathered = self._gathered
        assert sinks is None
        assert gathered is not None
        assert step.open is not None
        found = coded_decode(
            query.flatten(1, 2), *self.codes(layer), gathered.keys, gathered.values, step.open,
            step.page_table, chosen, counts, step.lengths, layer.scaling, step.unit,
        )  # fmt: skip
        out.copy_(found)
