"""Pages kept in a format: written when they are full, and read without the stock kernel.

A step first gathers, for each request, the pages that its queries stand in: what the open page
held, and the new tokens. Full ones are coded, the last one's tokens go back to the open page, and
then a query reads the pages before its own as they were coded and its own out of those that were
gathered. A single query reads through ``coded_decode``, which decodes what it reads as it goes;
a prompt's queries read their request's coded pages as they are decoded once for each step and
layer, for as many KV heads at once as a bounded scratch holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context

from kvplug import PageFormat, PromptKV, Segments
from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.encode_pages import encode_pages
from kvplug_kernels.page_layout import PageLayout
from kvplug_vllm.attention import PlannedBackend, PlannedImpl, Views
from kvplug_vllm.compression import Packing
from kvplug_vllm.open_pages import OpenLayer, open_layer
from kvplug_vllm.router import Rows
from kvplug_vllm.settings import Engine, offer_of, selected
from kvplug_vllm.step import PlannedBuilder, Selected, StepPlan, Whole

SCRATCH = 1 << 28
"""Bytes of decoded keys and values at once, or those of one KV head where they are more."""


def configured_format() -> PageFormat | None:
    """Of the pages of the engine whose layers are being made."""
    config = get_current_vllm_config_or_none()
    return offer_of(config).format if config is not None and selected(config) else None


@dataclass
class Writes:
    """What a step writes, of B rows whose queries stand in n pages. On the device."""

    slots: Tensor
    """As the engine numbers them. [T] int64; negative for padding"""
    begins: NDArray[np.int64]
    """The first of each row's pages among the n, [B]"""
    first: NDArray[np.int64]
    """and its number among the row's. [B]"""
    page_size: int
    pages: int = 0
    begun: Tensor | None = None
    """Of rows that go on in a page, that page among the n; [m] int64"""
    begun_rows: Tensor | None = None
    """and their row. [m] int64"""
    at: Tensor | None = None
    """Where each new token goes among the n * S. [T] int64; None where each row has one"""
    full: Tensor | None = None
    """Pages among the n that are full after the step, [f] int64"""
    full_tokens: Tensor | None = None
    """and the last token of each. [f] int64"""
    last: Tensor | None = None
    """Tokens that stand in the last page of their row, [l] int64"""
    last_rows: Tensor | None = None
    """and their row. [l] int64"""
    last_offset: Tensor | None = None
    """and their place in it. [l] int64"""

    def page_of(self, row: Any, position: Any) -> Any:
        """Among the n."""
        return self.begins[row] + position // self.page_size - self.first[row]


@dataclass
class Singles:
    """Q queries that read all they see, each by its own table."""

    tokens: Tensor | None
    """Rows of the flat queries; None for the first ones."""
    open: Tensor
    """The page of each among those that were gathered. [Q] int32"""
    table: Tensor
    """[Q, P] int32"""
    lengths: Tensor
    """[Q] int32"""


@dataclass
class Run:
    """Queries of one prompt, one after the other, over the same pages."""

    token: int
    """Row of the first among the flat queries."""
    start: int
    """Its place among the tokens that it sees."""
    queries: int
    open: int
    """The first one's page among those that were gathered; later ones follow."""
    table: Tensor
    """Pages before the last query's. [P] int32"""


@dataclass
class CodedReads:
    singles: Singles | None
    runs: list[Run]


@dataclass
class Gathered:
    """The plain pages of a step in one layer."""

    keys: Tensor
    """[n, S, H, D] by its strides"""
    values: Tensor


class CodedBackend(PlannedBackend):
    """Before a planned backend in the bases."""

    forward_includes_kv_cache_update = True


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
        self._gathered = self.write(layer, key, value, kv_cache, table, plan.writes)
        self._plan = plan
        try:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        finally:
            self._gathered = self._plan = None

    def write(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, table: Tensor,
        writes: Writes,
    ) -> Gathered:  # fmt: skip
        """The new tokens [T, H, D], where later steps and this one's queries find them."""
        open_pages = self.open_layer(layer)
        cache, layout = self.codes(layer, kv_cache)
        numbers, S = open_pages.numbers(), layout.page_size
        new = torch.stack([key, value], 1)[: len(writes.slots)].to(numbers.dtype)
        within = torch.arange(S, device=new.device)[None]
        if writes.at is None:  # a token a row, wherever it stands
            rows, table = len(writes.slots), table[: len(writes.slots)]
            slots = writes.slots.clamp(min=0)
            offset, known = slots % S, writes.slots >= 0
            gathered = numbers[open_pages.blocks_at(table, within)]  # [B, S, 2, H, D]
            index = torch.arange(rows, device=new.device)
            gathered[index, offset] = new
            pages = torch.where(known & (offset == S - 1), slots // S, -1)
            encode_pages(cache, gathered[:, :, 0], gathered[:, :, 1], pages, layout)
            block, place = open_pages.blocks_at(table, offset)
            numbers[torch.where(known, block, 0), place] = new
            return Gathered(gathered[:, :, 0], gathered[:, :, 1])
        assert writes.begun is not None
        assert writes.begun_rows is not None
        gathered = new.new_empty(writes.pages, S, *new.shape[1:])
        if len(writes.begun):
            gathered[writes.begun] = numbers[
                open_pages.blocks_at(table[writes.begun_rows], within)
            ]
        gathered.flatten(0, 1)[writes.at] = new
        keys, values = gathered[:, :, 0], gathered[:, :, 1]
        assert writes.full is not None
        assert writes.last is not None
        assert writes.last_rows is not None
        assert writes.last_offset is not None
        if len(writes.full):
            pages = writes.slots[writes.full_tokens] // S
            encode_pages(cache, keys, values, pages, layout, writes.full)
        at = open_pages.blocks_at(table[writes.last_rows], writes.last_offset)
        numbers[at] = new[writes.last]
        return Gathered(keys, values)

    def _whole(
        self, layer: Any, query: Tensor, kv_cache: Tensor, whole: Whole, output: Tensor
    ) -> None:
        reads: CodedReads = whole.metadata
        for run in reads.runs:
            self._run(layer, query, kv_cache, run, output)
        if reads.singles is None:
            return
        one, gathered = reads.singles, self._gathered
        assert gathered is not None
        cache, layout = self.codes(layer, kv_cache)
        picked = query[: len(one.lengths)] if one.tokens is None else query[one.tokens]
        out = coded_decode(
            picked, cache, layout, gathered.keys, gathered.values, one.open, one.table, None,
            None, one.lengths, self.scale,
        )  # fmt: skip
        output[slice(0, len(out)) if one.tokens is None else one.tokens] = out

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

    def _run(self, layer: Any, query: Tensor, kv_cache: Tensor, run: Run, output: Tensor) -> None:
        """From the last page to the first, each in its turn in place of what it was coded to."""
        gathered = self._gathered
        assert gathered is not None
        cache, layout = self.codes(layer, kv_cache)
        S, D, G = layout.page_size, layout.head_size, self.num_queries_per_kv
        first, coded = run.start // S, len(run.table)
        of_head = 2 * (coded + 1) * S * D * query.element_size()
        heads = max(1, SCRATCH // of_head)
        end = run.start + run.queries
        for head in range(0, self.num_kv_heads, heads):
            mine = slice(head, min(head + heads, self.num_kv_heads))
            H = mine.stop - head
            read = query.new_empty(2, (coded + 1) * S, H, D)
            if coded:
                for one, decoded in zip(
                    read, decode_pages(cache[:, mine], run.table, layout), strict=True
                ):
                    one[: coded * S] = decoded.flatten(0, 1)
            for page in range(coded, first - 1, -1):
                begin, stop = max(page * S, run.start), min((page + 1) * S, end)
                own = slice(page * S, stop)
                for one, plain in zip(read, (gathered.keys, gathered.values), strict=True):
                    one[own] = plain[run.open + page - first, : stop - page * S, mine]
                rows = slice(run.token + begin - run.start, run.token + stop - run.start)
                asked = query[rows, mine.start * G : mine.stop * G].unflatten(1, (H, G))
                n = stop - begin
                asked = asked.permute(1, 2, 0, 3).reshape(1, H, G * n, D)
                keys, values = (one[:stop].transpose(0, 1)[None] for one in read)
                sees = torch.arange(begin, stop, device=query.device)[:, None] >= torch.arange(
                    stop, device=query.device
                )
                out = scaled_dot_product_attention(
                    asked, keys, values, attn_mask=sees.repeat(G, 1), scale=self.scale
                )
                out = out.view(H, G, n, D).permute(2, 0, 1, 3)
                output[rows, mine.start * G : mine.stop * G] = out.flatten(1, 2)

    def rehearse_codes(self, layer: Any, key: Tensor, longest: int) -> None:
        """What a step's plain pages take, and a prompt's decoded ones."""
        assert Engine.current is not None
        S = self.open_layer(layer).layout.page_size
        rows = Engine.current.vllm_config.scheduler_config.max_num_seqs
        of_token = 2 * self.head_size * key.element_size()
        decoded = max(SCRATCH, 2 * (longest + S) * of_token)
        key.new_empty(
            decoded + (len(key) + rows * S) * self.num_kv_heads * of_token, dtype=torch.uint8
        )

    def read_pages(self, layer: Any, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        cache, layout = self.codes(layer, kv_cache)
        keys, values = decode_pages(cache, pages.flatten(), layout)
        shape = (len(pages), -1)
        return keys.unflatten(0, shape).flatten(1, 2), values.unflatten(0, shape).flatten(1, 2)

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
        """Whole pages, coded again."""
        cache, layout = self.codes(layer, kv_cache)
        S = layout.page_size
        keys, values = (
            packing.kept(each, tokens).unflatten(0, (-1, S))
            for each in (prompt.keys, prompt.values)
        )
        encode_pages(cache, keys, values, packing.slots[::S] // S, layout)


class CodedBuilder(PlannedBuilder):
    """Before a planned builder in the bases."""

    coded = True

    def writes(self, common: Any, rows: Rows) -> Writes:
        S = self.planner.page_size
        slots = common.slot_mapping
        if self.fixed:
            self.written = Writes(
                slots[: common.num_reqs], np.arange(len(rows.total)), rows.computed // S, S
            )
            return self.written
        computed, total = rows.computed, rows.total
        queries = total - computed
        first, last = computed // S, np.maximum(total - 1, 0) // S
        pages = np.where(queries > 0, last - first + 1, 0)
        begins = np.cumsum(pages) - pages
        row = np.repeat(np.arange(len(queries)), queries)
        offset = np.cumsum(queries) - queries
        position = np.arange(len(row)) - offset[row] + computed[row]
        page = begins[row] + position // S - first[row]
        begun = np.flatnonzero((computed % S > 0) & (queries > 0))
        ends = np.flatnonzero(position % S == S - 1)
        latest = np.flatnonzero(position // S == last[row])

        def tensor(values: NDArray[Any]) -> Tensor:
            return self._tensor(values, torch.int64)

        self.written = Writes(
            slots=slots[: len(row)],
            begins=begins,
            first=first,
            page_size=S,
            pages=int(pages.sum()),
            begun=tensor(begins[begun]),
            begun_rows=tensor(begun),
            at=tensor(page * S + position % S),
            full=tensor(page[ends]),
            full_tokens=tensor(ends),
            last=tensor(latest),
            last_rows=tensor(row[latest]),
            last_offset=tensor(position[latest] % S),
        )
        return self.written

    def _open(self, segments: Segments) -> NDArray[np.int64]:
        """The first query's page of each among those that are gathered. -> [n]"""
        if self.fixed:
            return np.arange(len(segments.row))
        found: NDArray[np.int64] = self.written.page_of(segments.row, segments.start)
        return found

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
        S, single = self.planner.page_size, rest.queries == 1
        runs = [
            Run(
                token=int(rest.token[n]),
                start=int(rest.visible[n] - rest.queries[n]),
                queries=int(rest.queries[n]),
                open=int(opened[n]),
                table=table[n, : int(rest.visible[n] - 1) // S],
            )
            for n in np.flatnonzero(~single).tolist()
        ]
        alone = np.flatnonzero(single)
        if not len(alone):
            return Whole(None, CodedReads(None, runs))
        tokens = rest.token[alone]
        in_order = not runs and (tokens == np.arange(len(tokens))).all()
        singles = Singles(
            None if in_order else self._tensor(tokens, torch.int64),
            self._tensor(opened[alone]),
            (table if in_order else table[self._tensor(alone, torch.int64)]).contiguous(),
            self._tensor(rest.visible[alone]),
        )
        return Whole(None, CodedReads(singles, runs))
