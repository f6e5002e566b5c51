"""Mixins that put a policy between vLLM and its own stock attention backend.

The builder (``kvplug_vllm.step``) plans once per step on the host; the implementation runs once
per layer on the device. What a policy leaves untouched goes through the stock path as it came.
Selected reads go through the stock kernel too: page p of KV head h is the virtual page p * H + h
of a cache with one KV head, and each (request, KV head) a sequence of its own with a shorter block
table, and so is each (block of a prompt's queries, KV head).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvplug import (
    BlockSelector,
    HeadBudgets,
    LayerReads,
    Observed,
    Offer,
    PromptKV,
    choose_pages,
    choose_units,
    keep_tokens,
    turn,
    window_queries,
)
from kvplug.head_pages import HeadPacking, head_tables
from kvplug_kernels.pack_tokens import pack_tokens
from kvplug_kernels.sparse_decode import sparse_decode
from kvplug_kernels.virtual_heads import virtual_heads
from kvplug_vllm import compat, eight_bits, metrics
from kvplug_vllm.cache import customize_spec, split_layers
from kvplug_vllm.compression import Packing
from kvplug_vllm.refusals import refuse
from kvplug_vllm.settings import NAME, Engine
from kvplug_vllm.step import ByHead, Selected, StepPlan, Whole


class PlannedBackend:
    """Before a stock AttentionBackend in the bases."""

    coded: ClassVar[Any] = None
    """The same for layers whose pages are kept in a format."""
    placed: ClassVar[Any] = None
    """The same for layers whose prompts go to the host."""
    layer_class: ClassVar[int | None] = 0
    """Which of the layers' different budgets, or formats, a layer has; None for a drafter's
    layer."""
    supports_kv_cache_update_bypass = False
    """Models may not write keys past do_kv_cache_update: digests would miss them (vLLM 0.33)."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # head-major pages: a head's keys lie together

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return customize_spec(super().customize_spec(spec), cls.layer_class)  # type: ignore[misc]


class Virtual(NamedTuple):
    """A layer's cache as one of a single KV head, with pages of our own."""

    cache: Tensor  # [pages, 1, tokens, 2D]
    page_stride: int
    head_stride: int
    token_stride: int
    """Between tokens where pages are parts of a block, else 0."""


class Views(NamedTuple):
    """Of one layer's cache."""

    tail: Tensor | None
    """Digests."""
    keys: Tensor  # [N, S, H, D], as they lie
    values: Tensor  # [N, S, H, D]
    virtual: dict[int, Virtual]
    """By the tokens of a page; for the stock kernel, in the engine's own dtype."""


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
    kv_cache_dtype: str
    sliding_window: Any
    attn_type: str
    logits_soft_cap: Any
    kv_sharing_target_layer_name: str | None
    sinks: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        if not Engine.serves(vllm_config):
            refuse(vllm_config)
        engine = Engine.enter(vllm_config)
        windowed = self.sliding_window not in (None, -1, (-1, -1))
        self.drafts = bool(engine.layers)
        """Whether a drafter has it: it sees all, whatever the model that verifies it sees."""
        self.planned = self.attn_type == AttentionType.DECODER and not windowed and not self.drafts
        """Windowed layers stay on the stock path; the policy plans the global ones."""
        self.offer = engine.offer
        """What requests of the engine may ask for."""
        self.digest = engine.offer.digest if self.planned else None
        self.local = False
        """Whether it is windowed by the policy (``cache.make_local``)."""
        self._window: dict[tuple[int, int], Tensor] = {}
        """By the stay of a request and the era of an event."""
        self.numbers = eight_bits.numbers(self.kv_cache_dtype)
        """What a cache's bytes are; None where it holds what the model computes in."""
        self.packed_prompts = 0
        """Prompts that were packed here, for tests and doctor."""
        dense = not engine.settings.policy.plans and not engine.offer.mixed
        if self.planned and not dense and getattr(self, "alibi_slopes", None) is not None:
            raise ValueError(
                "kvplug cannot serve a model with ALiBi: its bias depends on positions that a "
                "selection or a packed prompt does not keep; use the policy 'dense'"
            )
        if self.planned and self.sinks is not None and engine.offer.block_selectors:
            raise ValueError(
                f"kvplug: {engine.offer.block_selectors[0].name} reads each KV head's pages as "
                "sequences of their own, and the model's attention sinks belong to query heads; "
                "use a_shape or tri_shape"
            )
        if self.planned and self.sinks is not None and by_head(engine.offer):
            raise ValueError(
                f"kvplug: {engine.settings.policy} reads each KV head's pages as sequences of "
                "their own, and the model's attention sinks belong to query heads; use snapkv"
            )
        self.recent: Tensor | None = None
        """The queries of the last step, where a graph may have computed them. [B, Hq, D]"""
        self._single: Any = None
        self._views: Views | None = None
        self._viewed: Any = None

    def leave(self) -> None:
        """From now on the engine serves it as it serves windowed ones."""
        self.planned, self.digest = False, None

    def become_local(self) -> None:
        """From now on it is as if windowed by the configuration."""
        self.leave()
        self.local = True

    def reads_units(self, tokens: int, block_size: int) -> bool:
        """Whether the stock kernel reads pages of so many tokens, in blocks of so many, for KV
        heads apart: sinks belong to query heads."""
        return self.sinks is None and self.reads_pages(tokens, block_size)

    def reads_pages(self, tokens: int, block_size: int) -> bool:
        """Whether it reads such pages at all."""
        return tokens == block_size

    def reads_itself(self, block_size: int) -> list[str]:
        """The policies on offer whose units our own kernel reads where they lie."""
        return [
            each.name
            for each in self.offer.selectors
            if not self.reads_units(each.unit(each.page(block_size)), block_size)
        ]

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        assert Engine.current is not None
        split_layers(Engine.current)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        if self.digest is not None:
            self._take_in(layer, kv_cache, key, slot_mapping)

    def as_numbers(self, cache: Tensor) -> Tensor:
        """What an engine keeps as bytes, as the numbers that they are; else as it is."""
        return cache if self.numbers is None else cache.view(self.numbers)

    def logit_scale(self, layer: Any) -> float:
        """What q . k is multiplied by, of queries and keys as they lie."""
        return self.scale if self.numbers is None else self.scale * eight_bits.logit_factor(layer)

    def _take_in(self, layer: Any, kv_cache: Tensor, keys: Tensor | None, slots: Tensor) -> None:
        """Keys written at slots, into their pages' digests. None, and in eight bits: as they lie
        there by now."""
        views = self.views(layer, kv_cache)
        assert self.digest is not None and views.tail is not None
        if keys is None or self.numbers is not None:
            keys = self.as_numbers(self.written(layer, kv_cache, slots))
        self.digest.update(views.tail, keys, slots, views.keys)

    def written(self, layer: Any, kv_cache: Tensor, slots: Tensor) -> Tensor:
        """The keys that lie at slots [T], anything at negative ones. -> [T, H, D]"""
        at, size = slots.clamp(min=0), kv_cache.shape[2]
        return kv_cache[..., : self.head_size].transpose(1, 2)[at // size, at % size]

    def resume(self, layer: Any, kv_cache: Tensor, blocks: Tensor, slots: Tensor) -> None:
        """Take in anew all that pages hold: a digest cannot let go of a draft's key, but begins
        anew with its page's first. blocks [n], slots [n, S]; -1 for what is not taken in"""
        keys, _ = self.read_pages(layer, kv_cache, blocks[:, None])  # [n, S, H, D]
        self._take_in(layer, kv_cache, keys.flatten(0, 1), slots.flatten())

    def keys_and_values(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """As they lie, of a cache of numbers. [N, S, H, D] twice"""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values

    def views(self, layer: Any, kv_cache: Tensor) -> Views:
        """Made once: an engine keeps its cache, and views take as long as a choice of pages. They
        go with it: an engine may profile over a cache that it throws away before the real one."""
        if self._viewed is None or self._viewed() is not kv_cache:
            tail, cache = None, self.as_numbers(kv_cache)
            if self.digest is not None:
                shape = self.offer.digest_rows(cache.shape[2], cache.element_size())
                tail = compat.page_tail(cache, *shape, self.head_size)
            block = kv_cache.shape[2]
            units = {each.unit(each.page(block)) for each in self.offer.selectors}
            units |= {block} if self.offer.block_selectors or by_head(self.offer) else set()
            read = {unit for unit in units if self.reads_units(unit, block)}
            virtual = {unit: virtual_cache(kv_cache, unit) for unit in read}
            self._views = Views(tail, *self.keys_and_values(layer, cache), virtual)
            self._viewed = weakref.ref(kv_cache, self._forget_views)
        assert self._views is not None
        return self._views

    def _forget_views(self, viewed: Any) -> None:
        if self._viewed is viewed:
            self._views = self._viewed = None

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
        owns = self.kv_sharing_target_layer_name is None
        if attn_metadata is None and self.planned and owns and not kv_cache.numel():
            self.rehearse(layer, key)
        plan: StepPlan | None = getattr(attn_metadata, "kvplug", None) if self.planned else None
        reads = None
        if plan is not None:
            if plan.resumed is not None and owns:
                self.resume(layer, kv_cache, *plan.resumed)
            self.observe(query, plan.observations)
            if plan.replayed and self.recent is not None:
                self.recent[: len(query)].copy_(query)
            for phase in plan.phases:
                for packing in phase.packings:
                    with metrics.packing(Engine.current, packing.settings):
                        self.pack(layer, kv_cache, packing)
                reads = phase.layers[compat.layer_index(layer.layer_name)]
                if reads is not None:
                    self._read(layer, query, kv_cache, reads, output)
        if reads is None:
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        return output

    def _read(
        self, layer: Any, query: Tensor, kv_cache: Tensor, reads: LayerReads[Whole, Selected],
        output: Tensor,
    ) -> None:  # fmt: skip
        if reads.whole is not None:
            self._whole(layer, query, kv_cache, reads.whole, output)
        for selected, budget in reads.selected:
            self._selected(layer, query, kv_cache, selected, budget, output)

    def rehearse(self, layer: Any, key: Tensor) -> None:
        """Before there is a cache, where an engine measures how much memory a step takes."""

    def rehearse_codes(self, layer: Any, key: Tensor, longest: int) -> None:
        """As ``rehearse``, where pages are kept in a format."""

    def observe(self, query: Tensor, observations: Sequence[tuple[int, Observed]]) -> None:
        """Keep the windows' queries of events that are still to come."""
        for stay, seen in observations:
            window = self._window.pop((stay, seen.era), None)
            self._window[stay, seen.era] = window_queries(seen, query, window)

    def forget(self, staying: set[int]) -> None:
        """The windows of requests that left before they were packed."""
        for stay, era in list(self._window):
            if stay not in staying:
                del self._window[stay, era]

    def pack(self, layer: Any, kv_cache: Tensor, packing: Packing) -> None:
        """Copy what each KV head keeps into the request's private blocks."""
        if self.kv_sharing_target_layer_name is not None:
            return  # its owner does, by its keys
        scored, event = packing.scored, packing.event
        assert scored is not None
        self.packed_prompts += not event.era
        keys, values = self.read_packing(layer, kv_cache, packing)  # [1, T, H, D]
        window = None
        if scored.needs_queries:
            window = self._window.pop((packing.stay, event.era))[None]
        repeated, first = (
            None if pages is None else self.read_pages(layer, kv_cache, pages)[0]
            for pages in (packing.repeated, packing.first)
        )
        prompt = self.prompt(
            layer, keys, values, window, packing.pages.new_full((1,), event.tokens),
            kv_cache.shape[2], event.era, repeated,
            None if first is None else first[:, : event.first],
        )  # fmt: skip
        kinds = scored.kinds(compat.layer_index(layer.layer_name))
        if kinds is not None:
            mine = packing.by_head[kinds]
            tokens = keep_tokens(scored, prompt, mine.keep, mine.width, event.protect)
            self.store_heads(layer, kv_cache, mine, prompt, tokens)
            return
        keep = packing.pages.new_full((1,), packing.width)
        tokens = keep_tokens(scored, prompt, keep, packing.width, event.protect)
        self.store_kept(layer, kv_cache, packing, prompt, tokens)

    def prompt(
        self, layer: Any, keys: Tensor, values: Tensor, window: Tensor | None, lengths: Tensor,
        page_size: int, event: int = 0, repeated: Tensor | None = None,
        first: Tensor | None = None,
    ) -> PromptKV:  # fmt: skip
        """window [J, W, Hq, D]: the queries of the last tokens. repeated, first [J, n, H, D]:
        keys that they see beside, as ``PromptKV``."""
        groups = (self.num_kv_heads, self.num_queries_per_kv)
        return PromptKV(
            keys=keys,
            values=values,
            queries=None if window is None else window.unflatten(2, groups),
            lengths=lengths,
            scale=self.logit_scale(layer),
            first_head=compat.first_kv_head(layer.layer_name, self.num_kv_heads),
            page_size=page_size,
            event=event,
            repeated=repeated,
            first=first,
        )

    def read_packing(
        self, layer: Any, kv_cache: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """What is packed. [1, T, H, D] twice"""
        return self.read_pages(layer, kv_cache, packing.pages)

    def store_kept(
        self, layer: Any, kv_cache: Tensor, packing: Packing, prompt: PromptKV, tokens: Tensor
    ) -> None:
        """Copy what was kept within the cache, keys and values at once. tokens [1, H, n]"""
        if packing.event.in_place:
            rows = torch.cat([prompt.keys, prompt.values], -1).view(kv_cache.dtype)
            pages, offset = packing.slots // kv_cache.shape[2], packing.slots % kv_cache.shape[2]
            kv_cache[pages, :, offset] = packing.kept(rows, tokens)
        else:
            keep = packing.pages.new_full((1,), packing.width)
            cache = self.as_numbers(kv_cache)
            pack_tokens(cache, packing.pages, tokens, keep, packing.private)
        if self.digest is not None:
            kept = None if self.numbers is not None else packing.kept(prompt.keys, tokens)
            self._take_in(layer, kv_cache, kept, packing.slots)

    def store_heads(
        self, layer: Any, kv_cache: Tensor, packing: HeadPacking, prompt: PromptKV, tokens: Tensor
    ) -> None:
        """As ``store_kept``, where each head keeps its own number. tokens [1, H, width]"""
        kept = [packing.kept(each, tokens) for each in (prompt.keys, prompt.values)]
        kv_cache[packing.page, packing.place, packing.offset] = torch.cat(kept, -1)

    def read_pages(self, layer: Any, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole pages. pages [J, P] -> [J, P * S, H, D] twice"""
        _, heads, size, width = kv_cache.shape
        read = kv_cache.new_empty(pages.numel(), size, heads, width)
        torch.index_select(kv_cache.transpose(1, 2), 0, pages.flatten(), out=read)
        read = self.as_numbers(read).view(len(pages), -1, heads, width)  # [J, T, H, 2D]
        keys, values = read.split(self.head_size, dim=-1)
        return keys, values

    def take_pages(
        self, layer: Any, kv_cache: Tensor, sources: Tensor, into: Tensor, cosines: Tensor,
        sines: Tensor,
    ) -> None:  # fmt: skip
        """Copy pages [m] int64 of the cache to others, with their keys turned by angles [m, n]."""
        size = kv_cache.shape[2]
        keys, values = self.read_pages(layer, kv_cache, sources[:, None])  # [m, S, H, D]
        keys = turn(keys, cosines, sines)
        slots = into[:, None] * size + torch.arange(size, device=into.device)
        keys, values = (each.flatten(0, 1).contiguous() for each in (keys, values))
        self.do_kv_cache_update(layer, keys, values, kv_cache, slots.flatten())

    def _whole(
        self, layer: Any, query: Tensor, kv_cache: Tensor, whole: Whole, output: Tensor
    ) -> None:
        if whole.by_head is not None:
            self._by_head(layer, query, kv_cache, whole.by_head, output)
        tokens = whole.tokens
        if whole.metadata is None:
            return
        if tokens is None:
            super().forward(layer, query, None, None, kv_cache, whole.metadata, output)  # type: ignore[misc]
            return
        out = output.new_empty(len(tokens), *output.shape[1:])
        super().forward(layer, query[tokens], None, None, kv_cache, whole.metadata, out)  # type: ignore[misc]
        output.index_copy_(0, tokens, out)

    def _by_head(
        self, layer: Any, query: Tensor, kv_cache: Tensor, part: ByHead, output: Tensor
    ) -> None:
        """Each (request, KV head) as a sequence of its own over a cache of one KV head."""
        n, H = part.pages.shape
        virtual = self.views(layer, kv_cache).virtual[kv_cache.shape[2]]
        if compat.layer_index(layer.layer_name) == part.first:
            part.metadata.block_table = head_tables(
                part.page_table, part.kept, part.pages, part.width, virtual.page_stride,
                virtual.head_stride,
            )  # fmt: skip
        queries = n if part.order is None else len(part.order) // H
        picked = query[:queries] if part.tokens is None else query[part.tokens]  # [Q, Hq, D]
        rows = picked.reshape(queries * H, self.num_queries_per_kv, self.head_size)
        rows = rows if part.order is None else rows[part.order]
        out = output.new_empty(rows.shape)
        self.stock.forward(self.single, layer, rows, None, None, virtual.cache, part.metadata, out)
        if part.order is not None:
            out = torch.empty_like(out).index_copy_(0, part.order, out)
        at = slice(0, queries) if part.tokens is None else part.tokens
        output[at] = out.view(queries, *output.shape[1:])

    @property
    def single(self) -> Any:
        """The stock implementation for one KV head."""
        if self._single is None:
            self._single = compat.single_head_impl(self)
        return self._single

    def _selected(
        self,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        step: Selected,
        budget: int | float,
        output: Tensor,
    ) -> None:
        size, blocks, selector = kv_cache.shape[2], step.blocks, step.selector
        queries = len(step.lengths) if blocks is None else len(blocks.rows) // self.num_kv_heads
        picked = query[:queries] if step.tokens is None else query[step.tokens]  # [Q, Hq, D]
        heads = picked.view(queries, self.num_kv_heads, self.num_queries_per_kv, -1)
        views, scale = self.views(layer, kv_cache), self.logit_scale(layer)
        tail, described = self.described(layer, kv_cache, step)
        tail = tail if selector.digest is not None else None
        asked = heads.to(output.dtype)  # queries may be of eight bits too
        if isinstance(selector, BlockSelector):
            every = query.view(len(query), *heads.shape[1:]).to(output.dtype)
            chosen, counts = self._pages(layer, kv_cache, every, asked, tail, step, selector)
        else:
            chosen, counts = choose_units(
                selector, asked, tail, described, step.pages, step.lengths,
                step.keep[budget], page_size=step.page, width=step.width, scale=scale,
            )  # fmt: skip
        if step.metadata is None:
            out = self._attend(layer, asked.flatten(1, 2), kv_cache, step, chosen, counts)
            self._put(step, out, output)
            return
        virtual = views.virtual[step.unit]
        chosen = self.columns(layer, kv_cache, step, chosen, counts)
        table, lengths = virtual_heads(
            step.page_table, chosen, counts, step.lengths, size, virtual.page_stride,
            virtual.head_stride, unit=step.unit, token_stride=virtual.token_stride,
        )  # fmt: skip
        if budget == selector.budget and selector.mass is None:
            metadata = step.metadata
            metadata.block_table = table
        else:
            metadata = step.rebuild(table, lengths)
        grouped = (queries * self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        rows = heads.reshape(grouped)
        in_place = step.tokens is None and step.among is None and output.is_contiguous()
        if blocks is not None:
            rows, in_place = rows[blocks.rows], False
        out = output[:queries].view(grouped) if in_place else output.new_empty(grouped)
        self.stock.forward(self.single, layer, rows, None, None, virtual.cache, metadata, out)
        if blocks is not None:
            out = torch.empty_like(out).index_copy_(0, blocks.rows, out)
        if not in_place:
            self._put(step, out.view(queries, *output.shape[1:]), output)

    def described(
        self, layer: Any, kv_cache: Tensor, step: Selected
    ) -> tuple[Tensor | None, Tensor]:
        """Digests, and where those of the pages that each query sees are among them."""
        return self.views(layer, kv_cache).tail, step.page_table

    def columns(
        self, layer: Any, kv_cache: Tensor, step: Selected, chosen: Tensor, counts: Tensor
    ) -> Tensor:
        """Where the page table names what was chosen, once it is there."""
        return chosen

    def _attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, step: Selected, chosen: Tensor,
        counts: Tensor,
    ) -> Tensor:  # fmt: skip
        """Where the stock kernel reads no such units. query [Q, Hq, D]"""
        views = self.views(layer, kv_cache)
        out = sparse_decode(
            query, views.keys, views.values, step.page_table, chosen, counts, step.lengths,
            self.logit_scale(layer), step.unit, self.sinks, self.logits_soft_cap or 0.0,
        )  # fmt: skip
        if self.numbers is not None and (factor := eight_bits.value_factor(layer)) != 1:
            out *= factor
        return out

    def _pages(
        self, layer: Any, kv_cache: Tensor, every: Tensor, query: Tensor, tail: Tensor | None,
        step: Selected, selector: BlockSelector,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What blocks of queries [T, H, G, D] read, as ``choose_pages``; every: the step's."""
        blocks = step.blocks
        assert blocks is not None
        keys, table = None, step.page_table
        if selector.needs_keys:
            keys, table = self.keys_of(layer, kv_cache, table)
        first = 0
        if selector.files:  # tell heads apart
            first = compat.first_kv_head(layer.layer_name, self.num_kv_heads)
        return choose_pages(
            selector, blocks, query, keys, tail, table, step.pages, step.keep[selector.budget],
            width=step.width, scale=self.logit_scale(layer), step=every, first_head=first,
        )  # fmt: skip

    def keys_of(self, layer: Any, kv_cache: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys as numbers, page by page, and the table of those pages. [N, S, H, D] by any
        strides, [n, P] int32"""
        return self.views(layer, kv_cache).keys, page_table

    def _put(self, step: Selected, out: Tensor, output: Tensor) -> None:
        """Where the step's flat queries have their output. out [Q, Hq, D]"""
        if step.among is not None:
            among = step.among[:, None, None] > 0
            output[: len(out)] = torch.where(among, out, output[: len(out)])
        else:
            output[slice(0, len(out)) if step.tokens is None else step.tokens] = out


def by_head(offer: Offer) -> bool:
    """Whether KV heads of a layer may keep different numbers of pages."""
    return any(isinstance(each, HeadBudgets) for each in offer.scorers)


def virtual_cache(kv_cache: Tensor, tokens: int) -> Virtual:
    """[N, H, S, C] -> the same bytes as pages of S tokens, or of fewer.

    Token t of block p of head h begins virtual page p * page stride + h * head stride, + t * token
    stride where pages are parts of a block. Where blocks are padded the page stride is no multiple
    of a head's bytes: virtual pages then overlap, one every greatest common divisor of strides.
    """
    pages, heads, size, width = kv_cache.shape
    page, head, token, _ = kv_cache.stride()
    assert size % tokens == 0 and token == width
    apart = token if tokens < size else 0
    unit = math.gcd(page, head, apart)
    last = (pages - 1) * page + (heads - 1) * head + (size - tokens) * apart
    count = last // unit + 1
    assert count < 2**31, f"{count} virtual pages do not fit an int32 block table"
    view = kv_cache.as_strided(
        (count, 1, tokens, width), (unit, head, width, 1), kv_cache.storage_offset()
    )
    return Virtual(view, page // unit, head // unit, apart // unit)
