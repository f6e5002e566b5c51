"""Decode steps that a CUDA graph replays: planned into buffers that never move.

What the host decides of a step (how many) is five numbers a request, copied into one buffer before
the graph is replayed. All that follows from them and from the pool's own tables (which) is
computed by the graph itself, in shapes that depend on the batch's size alone: where policies
select, every request does, a short one with all of its pages.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug import LayerReads
from kvplug_sglang import compat
from kvplug_sglang.compat import Hook
from kvplug_sglang.router import OWN
from kvplug_sglang.settings import Engine
from kvplug_sglang.step import Batch, Phase, Selected, StepPlan, StepPlanner, Whole

RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"


class Replayed:
    """The plan of any decode step of up to ``most`` requests, for one class of layers."""

    def __init__(self, steps: StepPlanner, most: int, longest: int) -> None:
        """longest: tokens of a request."""
        self.steps = steps
        device = steps.req_to_token.device
        self.own = steps.planner(OWN)
        selector = self.own.selector
        self.budgets = [] if selector is None else selector.budgets(steps.layers)
        rows = 4 + len(self.budgets) + sum(map(len, steps.kinds))
        self.fields = torch.zeros(rows, most, dtype=torch.int64, device=device)
        """Kept, first, packed and visible as in ``Segments``, then units to read by budget, and
        pages of each head by the layers' kinds."""
        held = np.append(self.own.held, 0)
        self.column = torch.arange(-(-longest // steps.page_size), device=device)[None]
        self.held = torch.from_numpy(held).to(device)[self.column.clamp(max=len(held) - 1)]
        self.width = self.own.width(longest)
        self.rewrites = (
            self.own.scored is not None
            or self.own.eviction is not None
            or steps.engine.offer.mixed
            or not steps.stock_serves
        )
        """Whether requests may see less than their row of the pool, or not as it is."""

    def load(self, batch: Batch, count: bool) -> None:
        """On the host, before the graph is captured or replayed."""
        segments = self.steps.segments(batch)
        if count:
            self.steps.count(segments.where(batch.known[segments.row]))
        fixed = segments.one_per_row(len(batch.total), selects=bool(self.budgets))
        values = np.zeros((len(self.fields), len(batch.total)), np.int64)
        values[:4] = fixed.kept, fixed.first, fixed.packed, fixed.visible
        for choice, part in fixed.by_choice().items():
            planner = self.steps.planner(choice)
            for n, budget in enumerate(self.budgets, start=4):
                values[n, part.row] = planner.selection(part, budget)
        row = 4 + len(self.budgets)
        for kinds in self.steps.kinds:
            values[row : row + len(kinds)] = self.steps.head_pages(kinds, fixed).T
            row += len(kinds)
        host = torch.from_numpy(values)
        if self.fields.is_cuda:
            host = host.pin_memory()  # of PyTorch's own cache: not reused before it is copied
        self.fields[:, : values.shape[1]].copy_(host, non_blocking=True)

    def plan(self, rows: Tensor, slots: Tensor) -> StepPlan:
        """In the graph. rows [B] of the pool, slots [B] of the step's tokens"""
        steps = self.steps
        kept, first, packed, visible, *more = self.fields[:, : len(rows)]
        keep, heads = more[: len(self.budgets)], iter(more[len(self.budgets) :])
        table = steps.table(rows, kept, first, packed, self.held, self.column)
        whole = selected = None
        if self.own.selector is not None and self.budgets:
            selected = Selected(
                selector=self.own.selector,
                tokens=None,
                page_table=table,
                pages=((visible + self.own.page - 1) // self.own.page).int(),
                keep=dict(zip(self.budgets, (each.int() for each in keep), strict=True)),
                lengths=visible.int(),
                page=self.own.page,
                unit=self.own.unit,
                width=self.width,
                open=steps.open_singles(len(rows)),
            )
        if self.rewrites:
            whole = steps.whole_singles(table, visible.int())
        by_kinds = {
            kinds: steps.heads_of(
                table, kept, visible, torch.stack([*islice(heads, len(kinds))], 1),
                self.column.shape[1],
            )
            for kinds in steps.kinds
        }  # fmt: skip
        scored = self.own.scored
        layers: dict[int, LayerReads[Whole, Selected] | None] = {}
        for layer in steps.layers:
            budget = self.own.layer_budget(layer)
            kinds = None if scored is None else scored.kinds(layer)
            if kinds is not None:
                layers[layer] = LayerReads(by_kinds[kinds])
            elif selected is not None and budget is not None:
                layers[layer] = LayerReads(selected=[(selected, budget)])
            else:
                layers[layer] = None if whole is None else LayerReads(whole)
        return steps.plan_singles([Phase((), layers)], rows, slots)

    def serves(self, choices: list[int]) -> bool:
        """Whether the graph that was captured holds for requests of these choices."""
        planners = [self.steps.planner(choice) for choice in set(choices)]
        return all(
            planner.selector == self.own.selector
            and (
                planner.selector is None
                or planner.settings.min_context <= self.own.settings.min_context
            )
            for planner in planners
        )


def replayable(original: Any, self: Any, forward_batch: Any) -> bool:
    """Around ``can_run_graph``: a batch that selects in another way than was captured, or packs
    answers, is served without a graph."""
    possible: bool = original(self, forward_batch)
    if not possible or Engine.serving().dense or forward_batch.rids is None:
        return possible
    tenants = Engine.serving().router.of(forward_batch.rids)
    choices = [tenant.choice for tenant in tenants]
    backend = compat.planned_backend(self.attn_backend)
    if not all(each.serves(choices) for each in backend.replays):
        return False
    packs = any(backend.engine.planner(choice).schedule.every for choice in set(choices))
    return not packs or not any(each.eager(backend.batch(forward_batch)) for each in backend.steps)


def keep_ids(result: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """Behind the view that a replay is planned from, which leaves out whose rows they are."""
    result.rids = forward_batch.rids


HOOKS = (
    Hook(f"{RUNNER}.DecodeCudaGraphRunner.can_run_graph", "around", replayable,
         ("self", "forward_batch")),
    Hook(f"{RUNNER}.build_replay_fb_view", "after", keep_ids, ("forward_batch", "buffers", "bs")),
)  # fmt: skip
