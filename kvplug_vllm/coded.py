"""Layers that keep their pages in a format: they write and read them without the stock kernel
(``kvplug.coded``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvplug import PageFormat, PromptKV, Segments, coded
from kvplug.coded import CodedReads, Gathered, OpenPages, Singles, Writes
from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.page_layout import PageLayout
from kvplug_vllm.attention import PlannedBackend, PlannedImpl, Views
from kvplug_vllm.compression import Packing
from kvplug_vllm.open_pages import OpenLayer, kv_cache_layouts, open_layer
from kvplug_vllm.router import Rows
from kvplug_vllm.settings import Engine, offer_of, selected
from kvplug_vllm.step import PlannedBuilder, Selected, StepPlan, Whole


def configured_format() -> PageFormat | None:
    """Of the pages of the engine whose layers are being made."""
    config = get_current_vllm_config_or_none()
    return offer_of(config).format if config is not None and selected(config) else None


class CodedBackend(PlannedBackend):
    """Before a planned backend in the bases."""

    forward_includes_kv_cache_update = True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return kv_cache_layouts()


class CodedImpl(PlannedImpl):
    """Before a planned implementation in the bases."""

    _gathered: Gathered | None = None
    _plan: StepPlan | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.format = self.offer.format
        if not self.planned:
            raise ValueError(
                f"kvplug: {self.format} codes the pages of all layers, and some of the model's "
                "see a window or are a drafter's; leave the format out"
            )
        for what, has in (
            ("attention sinks", self.sinks is not None),
            ("a soft cap of its logits", bool(self.logits_soft_cap)),
            ("layers that share a cache", self.kv_sharing_target_layer_name is not None),
        ):
            if has:
                raise ValueError(
                    f"kvplug: the model has {what}, beside which {self.format} was never run; "
                    "leave the format out"
                )

    def reads_units(self, tokens: int, block_size: int) -> bool:
        return False

    def reads_itself(self, block_size: int) -> list[str]:
        return []

    def open_layer(self, layer: Any) -> OpenLayer:
        assert Engine.current is not None
        return open_layer(layer.layer_name, Engine.current.vllm_config)

    def codes(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, PageLayout]:
        """Its pages' bytes, [N, H, page_bytes], and how they lie."""
        layout = self.open_layer(layer).layout
        return kv_cache.flatten(2)[..., : layout.page_bytes], layout

    def views(self, layer: Any, kv_cache: Tensor) -> Views:
        cache, layout = self.codes(layer, kv_cache)
        keys = layout.keys(cache)
        return Views(keys, keys, cache, {})

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attn_metadata is None:
            if not kv_cache.numel():
                self.rehearse(layer, key)
            return output.zero_()
        plan: StepPlan = attn_metadata.kvplug
        assert plan.writes is not None
        open_pages = self.open_layer(layer)
        everything: Any = get_forward_context().attn_metadata
        table = everything[open_pages.layer_name].table
        cache, layout = self.codes(layer, kv_cache)
        self._gathered = coded.write(
            key, value, cache, layout, OpenPages(open_pages.numbers(), table), plan.writes
        )
        self._plan = plan
        try:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        finally:
            self._gathered = self._plan = None

    def _whole(
        self, layer: Any, query: Tensor, kv_cache: Tensor, whole: Whole, output: Tensor
    ) -> None:
        assert self._gathered is not None
        cache, layout = self.codes(layer, kv_cache)
        coded.read(query, cache, layout, self._gathered, whole.metadata, self.scale, output)

    def _attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, step: Selected, chosen: Tensor,
        counts: Tensor,
    ) -> Tensor:  # fmt: skip
        gathered = self._gathered
        assert gathered is not None
        assert step.open is not None
        cache, layout = self.codes(layer, kv_cache)
        return coded_decode(
            query, cache, layout, gathered.keys, gathered.values, step.open, step.page_table,
            chosen, counts, step.lengths, self.scale, step.unit,
        )  # fmt: skip

    def rehearse_codes(self, layer: Any, key: Tensor, longest: int) -> None:
        """What a step's plain pages take, and a prompt's decoded ones."""
        assert Engine.current is not None
        rows = Engine.current.vllm_config.scheduler_config.max_num_seqs
        layout = self.open_layer(layer).layout
        taken = coded.step_bytes(
            layout, self.num_kv_heads, self.num_queries_per_kv, len(key), rows, longest
        )
        key.new_empty(taken, dtype=torch.uint8)

    def read_pages(self, layer: Any, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        return coded.tokens_of(*self.codes(layer, kv_cache), pages)

    def read_packing(
        self, layer: Any, kv_cache: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """A prompt's partial last page out of those that were gathered."""
        keys, values = self.read_pages(layer, kv_cache, packing.pages)
        S = kv_cache.shape[2]
        if (own := packing.event.tokens % S) and not packing.event.era:
            gathered, plan = self._gathered, self._plan
            assert gathered is not None
            assert plan is not None
            page = plan.writes.page_of(packing.event.row, packing.event.tokens)
            keys[0, -S:][:own] = gathered.keys[page, :own]
            values[0, -S:][:own] = gathered.values[page, :own]
        return keys, values

    def store_kept(
        self, layer: Any, kv_cache: Tensor, packing: Packing, prompt: PromptKV, tokens: Tensor
    ) -> None:
        keys, values = (packing.kept(each, tokens) for each in (prompt.keys, prompt.values))
        cache, layout = self.codes(layer, kv_cache)
        size = layout.page_size
        coded.store(keys, values, cache, layout, packing.slots[::size] // size)


class CodedBuilder(PlannedBuilder):
    """Before a planned builder in the bases."""

    coded = True

    def writes(self, common: Any, rows: Rows) -> Writes:
        size, slots = self.planner.page_size, common.slot_mapping
        if self.fixed:
            slots = slots[: common.num_reqs]
            self.written = Writes.of_singles(slots, rows.computed, size)
        else:
            self.written = Writes.of(slots, rows.computed, rows.total, size, self._tensor)
        return self.written

    def _open(self, segments: Segments) -> NDArray[np.int64]:
        """The first query's page of each among those that are gathered. -> [n]"""
        if self.fixed:
            return np.arange(len(segments.row))
        return self.written.opened(segments)

    def _selected(self, common: Any, segments: Segments) -> Selected:
        opened = self._lasting("selected.open", self._open(segments))
        return replace(super()._selected(common, segments), open=opened)

    def _whole(
        self, common: Any, metadata: Any, segments: Segments, rest: Segments,
        select: tuple[tuple[int, bool], ...], kinds: tuple[bool, ...] | None = None,
    ) -> Whole:  # fmt: skip
        name = "rest" if select else "whole"
        table, opened = self._table(common, rest, name), self._open(rest)
        if self.fixed:
            singles = Singles(
                None, self._lasting(f"{name}.open", opened), table,
                self._lasting(f"{name}.lengths", rest.visible),
            )  # fmt: skip
            return Whole(None, CodedReads(singles, []))
        return Whole(None, CodedReads.of(rest, opened, table, self._tensor))
