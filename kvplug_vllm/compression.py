"""Prompts that a step compresses: whose last queries it keeps, what it packs, and where.

The private blocks that hold what a prompt keeps come from the scheduler (``kvplug_vllm.packing``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug import BatchPlanner, Observed, Segments, Settings
from kvplug.policy import Positions
from kvplug_vllm.metrics import Metrics
from kvplug_vllm.metrics import packing as packing_time
from kvplug_vllm.router import Router, Rows
from kvplug_vllm.settings import Engine


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
class Compression:
    """What a builder of attention metadata plans of it, for its layers."""

    planner: BatchPlanner
    tensor: Callable[[Positions], Tensor]
    """The builder's own: an array on the device."""
    vllm_config: Any
    layer_names: Sequence[str]
    metrics: Metrics | None
    passed: set[int] = field(default_factory=set)
    """Stays whose last step passed their prompt's end before it was cached."""

    def ended(self, passing: Positions, rows: Rows, prompt: Positions) -> Positions:
        """Those of the rows that pass their prompt's end whose prompt is to be packed; prompt [B].

        What passed it ahead of the prompt's last token may have been drafts alone, padding of the
        engine's, and rejected: the step that decodes the first token then passes it again.
        """
        again = np.isin(rows.stay, list(self.passed)) & (rows.computed == prompt)
        self.passed.difference_update(rows.stay.tolist())
        early = passing[rows.computed[passing] < prompt[passing]]
        self.passed.update(rows.stay[early].tolist())
        return passing[~again[passing]]

    def observations(self, rows: Rows, seen: Sequence[Observed]) -> list[tuple[int, Observed]]:
        """By the stay of their request. What is kept of requests that have left is let go."""
        wanted = [(int(rows.stay[each.row]), each) for each in seen if not rows.ends[each.row]]
        if wanted:
            staying = Router.staying(self.vllm_config)
            for layer in self._planned():
                layer.impl.forget(staying)
        return wanted

    def observe(self, observations: Sequence[tuple[int, Observed]]) -> None:
        """In all layers, what the last step may have computed without running any Python: a
        prompt's last chunk of one token is replayed as a decode."""
        if observations:
            for layer in self._planned():
                layer.impl.observe(layer.impl.recent, observations)

    def redirect(self, common: Any, segments: Segments) -> None:
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
        at = self.tensor(behind.row[segment])
        block = common.block_table_tensor[at, self.tensor(column)]
        offset = self.tensor(position % behind.page_size)
        slots = block.to(torch.int64) * behind.page_size + offset
        common.slot_mapping[self.tensor(tokens)] = slots

    def packings(
        self, common: Any, ended: Positions, rows: Rows, prompt: Positions
    ) -> list[Packing]:
        """ended [n]: rows of the batch whose prompts are packed, one at a time, so that the
        memory it takes is that of one; prompt [B]"""
        return [
            self._packing(common, ended[n : n + 1], rows, prompt[ended[n : n + 1]])
            for n in range(len(ended))
        ]

    def _packing(self, common: Any, ended: Positions, rows: Rows, prompt: Positions) -> Packing:
        """ended, prompt [J]: of one policy"""
        planner = self.planner.planners[int(rows.choice[ended[0]])]
        size = planner.page_size
        private = planner.private_pages(prompt)
        ends = -(-prompt // size)
        table = common.block_table_tensor[self.tensor(ended)].long()
        columns = np.minimum(np.arange(int(ends.max()))[None], ends[:, None] - 1)
        places = ends[:, None] + np.minimum(np.arange(int(private.max())), private[:, None] - 1)
        blocks = table.gather(1, self.tensor(places))
        keep, width = private * size, int(private.max()) * size
        if self.metrics is not None:
            self.metrics.count_packed(prompt, keep + prompt % size, planner.settings)
        packed = np.flatnonzero((np.arange(width)[None] < keep[:, None]).ravel())
        slots = (blocks[:, :, None] * size + torch.arange(size, device=blocks.device)).flatten()
        kept = self.tensor(packed)
        return Packing(
            settings=planner.settings,
            pages=table.gather(1, self.tensor(columns)),
            lengths=self.tensor(prompt),
            keep=self.tensor(keep),
            width=width,
            private=blocks,
            slots=slots[kept],
            packed=kept,
            stays=rows.stay[ended].tolist(),
        )

    def pack_now(self, packings: Sequence[Packing]) -> None:
        """In all layers, before a step that a CUDA graph may replay without running any Python.

        Nothing is missing: a single-token step passes the prompt's end with all of it cached.
        """
        for layer in self._planned():
            for packing in packings:
                with packing_time(Engine.current, packing.settings):
                    layer.impl.pack(layer, layer.kv_cache, packing)

    def _planned(self) -> Iterator[Any]:
        context = self.vllm_config.compilation_config.static_forward_context
        return (context[name] for name in self.layer_names)
