"""A mixin that puts a policy between SGLang and its own stock attention backend.

``init_forward_metadata`` plans once per step on the host; the forward methods run once per layer
on the device. What a policy leaves untouched goes through the stock path as it came. Selected
reads go through the stock kernel too: token slot s of KV head h is slot s * H + h of a cache with
one KV head, and each (request, KV head) a sequence of its own with fewer tokens, as is each (block
of a prompt's queries, KV head).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from kvplug import BlockSelector, Rotation, choose_pages, choose_units, turn, window_queries
from kvplug.head_pages import HeadPacking
from kvplug_kernels.fp8 import FP8
from kvplug_sglang import compat
from kvplug_sglang.cache import Digests, layer_bytes, page_bytes
from kvplug_sglang.compression import Packing
from kvplug_sglang.router import OWN, Tenant
from kvplug_sglang.settings import Engine
from kvplug_sglang.step import (
    Batch,
    Heads,
    Phase,
    Selected,
    StepPlan,
    StepPlanner,
    Whole,
    tokens_of,
)

TOKENS_AT_ONCE = 4096
"""That are taken from elsewhere in the pool, in each layer: they are copied out of it and back."""


class PlannedAttention:
    """Before a stock AttentionBackend in the bases, which brings ``attend``."""

    needs_cpu_seq_lens = True  # plans are made from lengths, on the host
    planner: ClassVar[type[StepPlanner]] = StepPlanner
    reads_eight_bits: ClassVar[bool] = False
    """Whether all that its kernel reads, it reads from the cache: then a cache of fp8 is the same
    to it in a step of ours."""
    req_to_token_pool: Any
    token_to_kv_pool: Any
    attend: Callable[..., None]
    """(layer, query [N, Hq, D], whole, out [N, Hq, D], sinks [Hq] or None)"""
    attend_heads: Callable[..., None]
    """(layer, query [Q, H, G, D], step, chosen [Q, H, K], counts [Q, H], out [Q, Hq, D], sinks)"""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)  # type: ignore[call-arg]
        self.needs_cpu_seq_lens = True  # the stock backend may have set its own
        self.engine = Engine.of(runner)
        pool = self.token_to_kv_pool
        if pool.dtype in FP8 and not self.reads_eight_bits and not self.engine.dense:
            raise ValueError(
                "kvplug: the checkpoint's KV cache is fp8, of which SGLang's kernel here reads "
                "what a step adds before it is quantised; use --kv-cache-dtype bfloat16, or the "
                "policy 'dense'"
            )
        self.windows = compat.windows(runner)
        """Of the layers that see no more, in tokens: they stay on the stock path."""
        self.layers = compat.planned_layers(runner)
        """Those that the policy plans; one that reads another's cache by its owner's number."""
        planned = max(len(self.layers), 1)  # dense serves a model that has none
        table = self.req_to_token_pool.req_to_token
        self.steps = [
            self.planner(self.engine, planners, table, layers, len(layers) / planned)
            for planners, layers in self.engine.serve(self.layers, len(table), table.device)
        ]
        widest = max(self.windows.values(), default=0)
        self.engine.see(widest, runner.model_config.context_len, self.layers)
        self.step_of = {layer: n for n, each in enumerate(self.steps) for layer in each.layers}
        self.digests = Digests.of(self.engine, pool, sorted(set(self.layers)))
        if self.layers:
            self.engine.kv_heads = pool.get_kv_buffer(self.layers[0])[0].shape[1]
        self.engine.layer_bytes = layer_bytes(pool, self.digests, self.engine.page_size)
        if not self.engine.dense:
            self.engine.page_bytes = page_bytes(pool, self.digests, self.engine.page_size)
        self.rotation: Rotation | None = None
        """By which keys are moved, where requests may take chunks from elsewhere in the pool."""
        if self.engine.offer.settings.policy.reuse is not None:
            model = runner.model_config
            self.rotation = Rotation.of(model.hf_text_config, model.head_dim)
            self.attending = compat.attending(runner)
        self.plans: list[StepPlan | None] = [None] * len(self.steps)
        """Of the step at hand, for each of ``steps``."""
        self.selected_queries = 0
        """Queries that went through a selection here, over all layers, for tests."""
        self.selected_blocks = 0
        """Blocks of prompts' queries that did."""
        self.packed_prompts = 0
        self.planned_steps = 0

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        batch = self.batch(forward_batch)
        if self.engine.dense:
            self._count_dense(batch)
            return
        self.take()
        if self.rotation is not None and batch is not None:
            # In place: the model reads the positions of this very batch.
            where, stands = self.steps[0].moved(batch)
            forward_batch.positions[where] = stands.to(forward_batch.positions.dtype)
        self.plans = [None if batch is None else each.plan(batch) for each in self.steps]
        self.planned_steps += any(
            any(phase.layers.values()) for plan in self.plans if plan for phase in plan.phases
        )

    def take(self) -> None:
        """Fill the pages that requests take from elsewhere, in all layers, before anything of a
        step runs: it may write over what they were taken from."""
        for taken in self.engine.to_take():
            assert self.rotation is not None
            most = max(TOKENS_AT_ONCE // self.engine.page_size, 1)
            for part, *angles in self.rotation.in_parts(taken.shifts, most):
                cosines, sines = (each.to(taken.into.device) for each in angles)
                for layer in self.attending:
                    self._take(layer, taken.sources[part], taken.into[part], cosines, sines)

    def _take(
        self, layer: Any, sources: Tensor, into: Tensor, cosines: Tensor, sines: Tensor
    ) -> None:
        """Copy pages [m] to others, with their keys turned by angles [m, n]."""
        size = self.engine.page_size
        slots = tokens_of(sources[:, None], size)
        keys, values = (each[slots] for each in self._kv(layer.layer_id))  # [m, S, H, D]
        where = KVWriteLoc(tokens_of(into[:, None], size).flatten())
        moved = turn(keys, cosines, sines).flatten(0, 1)
        self.token_to_kv_pool.set_kv_buffer(layer, where, moved, values.flatten(0, 1))

    def _count_dense(self, batch: Batch | None) -> None:
        """All that a dense server costs in a step: no plan, and nothing on the device."""
        if batch is not None:
            for each in self.steps:
                each.count_dense(batch)

    def batch(self, forward_batch: Any) -> Batch | None:
        """None for a batch of no request (a dummy run) and for an idle one."""
        mode = forward_batch.forward_mode
        if mode.is_idle() or not forward_batch.batch_size:
            return None
        total = forward_batch.seq_lens_cpu.numpy().astype(np.int64)
        if mode.is_decode():
            computed = total - 1
        else:
            assert mode.is_extend(), f"kvplug does not know the forward mode {mode.name}"
            computed = np.array(forward_batch.extend_prefix_lens_cpu, np.int64)
        tenants = self.engine.router.of(getattr(forward_batch, "rids", None) or [])
        # Rows of nobody: padding, a graph that is captured, an engine without a scheduler.
        assert mode.is_decode() or len(tenants) in (0, len(total)), "requests without an id"
        prompts = (computed if mode.is_decode() else total)[len(tenants) :]
        tenants += [Tenant(OWN, prompt) for prompt in prompts.tolist()]
        rows, slots = forward_batch.req_pool_indices.long(), forward_batch.out_cache_loc
        return Batch(rows, computed, total, tenants, slots)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, **more: Any,
    ) -> Tensor:  # fmt: skip
        stock = super().forward_decode  # type: ignore[misc]
        return self._forward(stock, q, k, v, layer, forward_batch, save_kv_cache, more)

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, **more: Any,
    ) -> Tensor:  # fmt: skip
        stock = super().forward_extend  # type: ignore[misc]
        return self._forward(stock, q, k, v, layer, forward_batch, save_kv_cache, more)

    def _forward(
        self, stock: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, layer: Any,
        forward_batch: Any, save: bool, more: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        owns = k is not None  # else it reads what its owner has written and packed
        if not _planned(layer):
            output = stock(q, k, v, layer, forward_batch, save, **more)
            if owns and layer.layer_id in self.windows:
                self._keep_window(layer)
            return output
        plan = self.plans[self.step_of[layer.layer_id]]
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if plan is None or plan.phases[0].layers[layer.layer_id] is None:
            output = stock(q, k, v, layer, forward_batch, save, **more)
            if owns:
                self._written(layer, forward_batch.out_cache_loc)
            if owns and plan is not None:
                self._observe(layer, query, plan)
                self._pack_all(layer, plan.phases[0])
            return output
        sinks = more.pop("sinks", None)
        _refuse_extras(more)
        if owns:
            self._write(layer, forward_batch, k, v, save, plan)
            self._observe(layer, query, plan)
        output = query.new_empty(*query.shape[:2], layer.v_head_dim)
        for phase in plan.phases:
            if owns:
                self._pack_all(layer, phase)
            reads = phase.layers[layer.layer_id]
            assert reads is not None
            if reads.whole is not None:
                self._whole(layer, query, reads.whole, output, sinks)
            for selected, budget in reads.selected:
                self._selected(layer, query, selected, budget, output, sinks)
        return output.flatten(1)

    @property
    def _kv(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        return self.token_to_kv_pool.get_kv_buffer

    def _write(
        self, layer: Any, forward_batch: Any, k: Tensor, v: Tensor, save: bool, plan: StepPlan
    ) -> None:
        """The step's keys and values, unless they stand there already."""
        if save:
            where = KVWriteLoc.for_batch(forward_batch)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
        self._written(layer, forward_batch.out_cache_loc)

    def _written(self, layer: Any, slots: Tensor) -> None:
        """Keys stand at ``slots``, whoever wrote them: by the backend or fused into RoPE."""
        if self.digests is not None:
            keys, _ = self._kv(layer.layer_id)
            self.digests.update(layer.layer_id, keys, slots)

    def _observe(self, layer: Any, query: Tensor, plan: StepPlan) -> None:
        for tenant, seen in plan.observations:
            window, key = tenant.window, (layer.layer_id, seen.era)
            window[key] = window_queries(seen, query, window.get(key))

    def _pack_all(self, layer: Any, phase: Phase) -> None:
        for packing in phase.packings:
            with self.engine.packing(packing.tenant.choice):
                self._pack(layer, packing)

    def _pack(self, layer: Any, packing: Packing) -> None:
        """Copy what each KV head keeps into the request's private slots."""
        self.packed_prompts += layer.layer_id == self.layers[0] and not packing.era
        window, kinds = None, packing.scored.kinds(layer.layer_id)
        if packing.scored.needs_queries:
            window = packing.tenant.window.pop((layer.layer_id, packing.era))
        by_head = None if kinds is None else packing.by_head[kinds]
        keys, values = packing.kept(
            *self._prompt(layer, packing),
            window,
            scale=compat.logit_scale(layer),
            first_head=compat.first_kv_head(layer),
            page_size=self.engine.page_size,
            by_head=by_head,
        )
        if by_head is None:
            self._store(layer, packing, keys, values)
        else:
            self._store_heads(layer, by_head, keys, values)

    def _prompt(self, layer: Any, packing: Packing) -> tuple[Tensor, Tensor]:
        """What is packed, of all KV heads. [T, H, D] twice"""
        keys, values = self._kv(layer.layer_id)
        return keys[packing.slots], values[packing.slots]

    def _store(self, layer: Any, packing: Packing, keys: Tensor, values: Tensor) -> None:
        """What stays of it, [n, H, D]."""
        where = KVWriteLoc(packing.targets)
        self.token_to_kv_pool.set_kv_buffer(layer, where, keys, values)
        self._written(layer, packing.targets)

    def _store_heads(self, layer: Any, packing: HeadPacking, keys: Tensor, values: Tensor) -> None:
        """The same where each head keeps its own number, [N, D]."""
        slots = packing.page * self.engine.page_size + packing.offset
        for cache, kept in zip(self._kv(layer.layer_id), (keys, values), strict=True):
            _, heads, channels = cache.shape
            cache.view(-1, channels).index_copy_(0, slots * heads + packing.place, kept)

    def _digest(self, layer: Any) -> Tensor | None:
        """What its pages say of their keys."""
        return None if self.digests is None else self.digests.of_layer(layer.layer_id)

    def _keep_window(self, layer: Any) -> None:
        """The private slots will stand in the request's row, which a windowed layer reads as it
        is: they take what has stood there."""
        widest = self.plans[0]
        for packing in () if widest is None else widest.phases[0].packings:
            keys, values = self._kv(layer.layer_id)
            slots, where = packing.replaced(self.engine.page_size), KVWriteLoc(packing.targets)
            self.token_to_kv_pool.set_kv_buffer(layer, where, keys[slots], values[slots])

    def _whole(
        self, layer: Any, query: Tensor, whole: Whole, output: Tensor, sinks: Tensor | None
    ) -> None:
        if whole.tokens is not None:
            query = query[whole.tokens]
        if isinstance(whole, Heads):
            assert sinks is None, "they belong to query heads, and these read by KV head"
            out = self._by_head(layer, query, whole)
            output[slice(None) if whole.tokens is None else whole.tokens] = out
            return
        if whole.tokens is None:
            self.attend(layer, query, whole, output, sinks)
            return
        out = output.new_empty(len(query), *output.shape[1:])
        self.attend(layer, query, whole, out, sinks)
        output.index_copy_(0, whole.tokens, out)

    def _by_head(self, layer: Any, query: Tensor, heads: Heads) -> Tensor:
        """Each run as it is read by a KV head. query [T, Hq, D] -> [T, Hq, Dv]"""
        rows = query.reshape(len(query) * heads.heads, -1, query.shape[2])  # [T * H, G, D]
        rows = rows if heads.order is None else rows[heads.order]
        out = rows.new_empty(*rows.shape[:2], layer.v_head_dim)
        self.attend(layer, rows, heads, out, None)
        if heads.order is not None:
            out = torch.empty_like(out).index_copy_(0, heads.order, out)
        return out.view(len(query), -1, layer.v_head_dim)

    def _selected(
        self, layer: Any, query: Tensor, step: Selected, budget: int | float, output: Tensor,
        sinks: Tensor | None,
    ) -> None:  # fmt: skip
        selector = step.selector
        digest = self._digest(layer)
        assert digest is not None or selector.digest is None
        mine = query if step.tokens is None else query[step.tokens]
        picked = mine.view(len(mine), layer.tp_k_head_num, -1, layer.qk_head_dim)  # [Q, H, G, D]
        if isinstance(selector, BlockSelector):
            every = query.view(len(query), *picked.shape[1:])
            heads = self._blocks(layer, every, picked, digest, selector, step)
            self._whole(layer, query, heads, output, sinks)
            return
        self.selected_queries += len(mine)
        chosen, counts = choose_units(
            selector, picked, digest, step.page_table, step.pages, step.lengths,
            step.keep[budget], page_size=step.page, width=step.width,
            scale=compat.logit_scale(layer),
        )  # fmt: skip
        if step.tokens is None:
            self.attend_heads(layer, picked, step, chosen, counts, output, sinks)
            return
        out = output.new_empty(len(mine), *output.shape[1:])
        self.attend_heads(layer, picked, step, chosen, counts, out, sinks)
        output.index_copy_(0, step.tokens, out)

    def _blocks(
        self, layer: Any, every: Tensor, query: Tensor, digest: Tensor | None,
        selector: BlockSelector, step: Selected,
    ) -> Heads:  # fmt: skip
        """What blocks of a prompt's queries [T, H, G, D] read; every: the step's."""
        blocks, size = step.blocks, self.engine.page_size
        assert blocks is not None
        self.selected_blocks += len(step.lengths)
        keys, first = None, compat.first_kv_head(layer)
        if selector.needs_keys:
            keys, _ = self._kv(layer.layer_id)
            keys = keys[: len(keys) // size * size].unflatten(0, (-1, size))
        chosen, counts = choose_pages(
            selector, blocks, query, keys, digest if selector.digest is not None else None,
            step.page_table, step.pages, step.keep[selector.budget], width=step.width,
            scale=compat.logit_scale(layer), step=every, first_head=first,
        )  # fmt: skip
        return Heads.of(step, chosen, counts, size)


def _planned(layer: Any) -> bool:
    """Windowed and cross-attention layers stay on the stock path."""
    decoder = layer.attn_type is AttentionType.DECODER and not layer.is_cross_attention
    return decoder and not compat.window(layer)


def _refuse_extras(more: dict[str, Any]) -> None:
    given = [name for name, value in more.items() if value is not None]
    if given:
        raise ValueError(
            f"kvplug does not know the model's attention arguments {given}; serve this model with "
            "the policy 'dense'"
        )
