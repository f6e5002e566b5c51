"""Requests that a step compresses: whose last queries it keeps, what it packs, and where.

The private blocks that hold what stays come from the scheduler (``kvplug_vllm.packing``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug import (
    BatchPlanner,
    Event,
    Observed,
    ScoredEviction,
    Segments,
    Settings,
)
from kvplug.head_pages import HeadPacking
from kvplug.policy import Positions
from kvplug_vllm.metrics import Metrics
from kvplug_vllm.metrics import packing as packing_time
from kvplug_vllm.router import Router, Rows
from kvplug_vllm.settings import Engine


@dataclass
class Packing:
    """A request whose kept tokens are packed in this step: n of T."""

    settings: Settings
    scored: ScoredEviction | None
    """None where all of it goes to the host."""
    event: Event
    stay: int
    pages: Tensor
    """What is packed, in order, a prompt's partial last page too. [1, P] int64"""
    repeated: Tensor | None
    """Pages of the tokens whose queries score it, where they repeat it. [1, P] int64"""
    first: Tensor | None
    """Pages of ``event.first`` tokens that they see beside. [1, P] int64"""
    private: Tensor
    """The pages that it is packed into, in order. [1, Kp] int64"""
    slots: Tensor
    """Where kept token k goes. [n] int64"""
    by_head: Mapping[tuple[bool, ...], HeadPacking]
    """In layers whose heads are of such kinds, and keep different numbers of tokens."""

    @property
    def width(self) -> int:
        """Tokens kept."""
        return len(self.slots)

    def kept(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """What goes to ``slots``. rows [1, T, H, D], tokens [1, H, n] -> [n, H, D]"""
        index = tokens[0].T[..., None].expand(-1, -1, rows.shape[-1])
        return rows[0].gather(0, index)


@dataclass(frozen=True)
class Compression:
    """What a builder of attention metadata plans of it, for its layers."""

    planner: BatchPlanner
    tensor: Callable[[Positions], Tensor]
    """The builder's own: an array on the device."""
    vllm_config: Any
    layer_names: Sequence[str]
    metrics: Metrics | None
    kinds: Sequence[tuple[bool, ...]] = ()
    """Of the layers whose KV heads keep different numbers of pages."""
    passed: set[int] = field(default_factory=set)
    """Stays whose last step passed their prompt's end before it was cached."""

    def ended(self, events: Sequence[Event], rows: Rows, prompt: Positions) -> list[Event]:
        """Those of a step's events that are to be packed; prompt [B].

        What passed a prompt's end ahead of its last token may have been drafts alone, padding of
        the engine's, and rejected: the step that decodes the first token then passes it again.
        """
        again = np.isin(rows.stay, list(self.passed)) & (rows.computed == prompt)
        self.passed.difference_update(rows.stay.tolist())
        for event in events:
            if not event.era and rows.computed[event.row] < prompt[event.row]:
                self.passed.add(int(rows.stay[event.row]))
        return [event for event in events if event.era or not again[event.row]]

    def observations(self, rows: Rows, seen: Sequence[Observed]) -> list[tuple[int, Observed]]:
        """By the stay of their request. What is kept of requests that have left is let go."""
        wanted = [
            (int(rows.stay[each.row]), each)
            for each in seen
            if not rows.ends[each.row] or rows.settings[rows.choice[each.row]].repeats
        ]
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
        self, common: Any, events: Sequence[Event], rows: Rows, prompt: Positions
    ) -> list[Packing]:
        """One at a time, so that the memory it takes is that of one; prompt [B]"""
        return [self._packing(common, event, rows, prompt[event.row]) for event in events]

    def _packing(self, common: Any, event: Event, rows: Rows, prompt: np.int64) -> Packing:
        planner = self.planner.planners[int(rows.choice[event.row])]
        size, course = planner.page_size, planner.schedule.course(int(prompt))
        column, private = course.column, course.private
        pages = np.asarray(event.pages)
        # Pages before the private ones stand where they did, the others behind them.
        columns = np.concatenate(
            [column + np.arange(event.private), pages + private * (pages >= column)]
        )
        scored = planner.schedule.scorer(event) if planner.scored is not None else None
        if self.metrics is not None and scored is not None:
            self.metrics.count_packed(event, planner.settings)
        table = common.block_table_tensor[event.row].long()
        blocks = table[self.tensor(event.into + np.arange(event.kept))]
        offset = torch.arange(size, device=blocks.device)

        def pages_of(numbers: range) -> Tensor | None:
            return table[self.tensor(np.asarray(numbers))][None] if numbers else None

        return Packing(
            settings=planner.settings,
            scored=scored,
            event=event,
            stay=int(rows.stay[event.row]),
            pages=table[self.tensor(columns)][None],
            repeated=pages_of(event.repeated),
            first=pages_of(range(-(-event.first // size))),
            private=blocks[None],
            slots=(blocks[:, None] * size + offset).flatten(),
            by_head=HeadPacking.by_kinds(
                planner.scored, self.kinds, event.tokens // size, blocks, size, self.tensor
            ),
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
