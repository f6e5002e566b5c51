"""Layers whose prompts go to host memory, and come back page by page as they are chosen.

In a request's private blocks lie [hot pages | directory] (``kvplug.placement``). Every block ends
in a digest: a directory's holds digests alone, one behind the other, so that all digests of the
cache are one array, those at the ends of blocks too. The end of a hot one says which page of the
prompt it holds for each KV head: what is where moves, and goes, with the request's blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none

from kvplug import Segments
from kvplug_kernels.host_memory import host_memory
from kvplug_kernels.resident_pages import EMPTY, resident_pages
from kvplug_vllm.attention import PlannedImpl
from kvplug_vllm.compression import Packing
from kvplug_vllm.settings import offer_of, selected
from kvplug_vllm.step import Placed, PlannedBuilder, Selected

PAGES_AT_ONCE = 256
"""That go to the host: they are copied in the pool's memory first."""


def places_prompts() -> bool:
    """Whether the engine whose layers are being made puts prompts on the host."""
    config = get_current_vllm_config_or_none()
    if config is None or not selected(config):
        return False
    return offer_of(config).settings.policy.placement is not None


class PlacedImpl(PlannedImpl):
    """Before a planned implementation in the bases."""

    host: Tensor | None = None
    """Pages of prompts, as they lie in the cache. [R, H, S, 2D]"""

    def take_host(self, spec: Any, digests: int, device: torch.device) -> None:
        """Once its cache's pages are known. digests: of a page of the directory."""
        if self.host is None:
            shape = spec.num_kv_heads, spec.block_size, 2 * spec.head_size
            rows = spec.directory * digests
            self.host = host_memory((rows, *shape), spec.dtype, device)

    def digests(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, int]:
        """All that lie in the cache, [N, H, rows, D], and how many lie in a block."""
        tail = self.views(layer, kv_cache).tail
        assert tail is not None
        heads, rows, width = tail.shape[1:]
        each = heads * rows * width
        block = kv_cache.stride(0)
        assert block % each == 0 and tail.storage_offset() + each == block + (
            kv_cache.storage_offset()
        ), f"digests of {each} numbers do not fill a block of {block}"
        one = tail.as_strided(
            (len(kv_cache) * (block // each), heads, rows, width),
            (each, *tail.stride()[1:]), kv_cache.storage_offset(),
        )  # fmt: skip
        return one, block // each

    def held(self, layer: Any, kv_cache: Tensor) -> Tensor:
        """Which page a hot block holds for each KV head. [N, H] int32"""
        tail = self.views(layer, kv_cache).tail
        assert tail is not None
        return tail[:, :, 0, : 4 // tail.element_size()].view(torch.int32)[..., 0]

    def pack(self, layer: Any, kv_cache: Tensor, packing: Packing) -> None:
        """Write the prompt's whole pages to the host; no hot block holds any yet."""
        assert self.host is not None
        digests, each = self.digests(layer, kv_cache)
        whole = packing.event.tokens // kv_cache.shape[2]
        pages, private = packing.pages[0, :whole], packing.private[0]
        listed = -(-whole // each)
        hot, directory = private[:-listed], private[-listed:]
        number = torch.arange(whole, device=pages.device)
        index = directory[number // each] * each + number % each
        digests[index] = digests[pages * each + each - 1]
        for first in range(0, whole, PAGES_AT_ONCE):
            some = slice(first, first + PAGES_AT_ONCE)
            self.host.index_copy_(0, index[some] - each, kv_cache[pages[some]])
        self.held(layer, kv_cache)[hot] = EMPTY
        self.packed_prompts += 1

    def _selected(
        self, layer: Any, query: Tensor, kv_cache: Tensor, step: Selected, budget: int | float,
        output: Tensor,
    ) -> None:  # fmt: skip
        super()._selected(layer, query, kv_cache, step, budget, output)
        assert step.placed is not None
        for later in step.placed.later:
            super()._selected(layer, query, kv_cache, later, budget, output)

    def described(
        self, layer: Any, kv_cache: Tensor, step: Selected
    ) -> tuple[Tensor | None, Tensor]:
        assert step.placed is not None
        return self.digests(layer, kv_cache)[0], step.placed.digests

    def columns(
        self, layer: Any, kv_cache: Tensor, step: Selected, chosen: Tensor, counts: Tensor
    ) -> Tensor:
        placed = step.placed
        assert placed is not None
        assert self.host is not None
        _, each = self.digests(layer, kv_cache)
        return resident_pages(
            kv_cache, self.held(layer, kv_cache), self.host, placed.digests,
            step.page_table[:, : placed.hot], placed.away, chosen, counts, placed.behind, each,
        )  # fmt: skip


class PlacedBuilder(PlannedBuilder):
    """Before a planned builder in the bases."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        self.digests = self.planner.planners[0].schedule.digests
        size = kv_cache_spec.block_size
        if not self.impl.reads_units(size, size):
            raise ValueError(
                f"kvplug: the attention kernel reads no pages of {size} tokens for KV heads "
                f"apart, as {self.offer.settings.policy.placement} brings them; use a model "
                "without attention sinks and --block-size 32, or leave host out"
            )
        for name in layer_names:
            context[name].impl.take_host(kv_cache_spec, self.digests, device)

    def _selected(self, common: Any, segments: Segments) -> Selected:
        """A request's hot pages hold what one query chose: others of it come later."""
        first, *later = [self._wave(common, part) for part in waves(segments)]
        assert first.placed is not None
        first.placed.later = later
        return first

    def _wave(self, common: Any, segments: Segments) -> Selected:
        """Of one query of each request."""
        selected = super()._selected(common, segments)
        placement, each = self.offer.settings.policy.placement, self.digests
        assert placement is not None
        there = np.where(segments.away > 0, segments.kept, 0)
        away = self._lasting("selected.away", segments.away)
        behind = self._lasting("selected.behind", there)
        table, widest = selected.page_table, common.block_table_tensor.shape[1]
        pages = widest if self.fixed else int(segments.pages.max(initial=1))
        page, far = torch.arange(pages, device=table.device)[None], away[:, None].long()
        near = page - far + behind[:, None]
        column = torch.where(page < far, placement.pages + page // each, near)
        offset = torch.where(page < far, page % each, each - 1)
        digests = table.gather(1, column.clamp(max=table.shape[1] - 1)) * each + offset
        digests = digests.to(torch.int32)
        placed = Placed(
            digests=self._lasting("selected.digests", digests, columns=widest),
            hot=placement.pages,
            away=away,
            behind=behind,
        )
        return replace(selected, placed=placed)


def waves(segments: Segments) -> list[Segments]:
    """The first query of each request that has pages on the host, the second, and so on; all of
    the others with the first."""
    begins = np.append(True, np.diff(segments.row) != 0)
    number = np.arange(len(segments.row))
    number = np.where(segments.away > 0, number - np.maximum.accumulate(number * begins), 0)
    return [segments.where(number == n) for n in range(int(number.max(initial=0)) + 1)]
