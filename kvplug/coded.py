"""Pages kept in a format: what a step writes of them, and how its queries read them.

A step first gathers, for each request, the pages that its queries stand in: what the open page
held, and the new tokens. Full ones are coded, the last one's tokens go back to the open page, and
then a query reads the pages before its own as they were coded and its own out of those that were
gathered. A single query reads through ``coded_decode``, which decodes what it reads as it goes;
a prompt's queries read their request's coded pages as they are decoded once for each step and
layer, for as many KV heads at once as a bounded scratch holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvplug.segments import Segments
from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.encode_pages import encode_pages
from kvplug_kernels.page_layout import Coded, PageLayout

SCRATCH = 1 << 28
"""Bytes of decoded keys and values at once, as they come and as they are read, or those of one KV
head where they are more."""

Numbers = NDArray[np.int64]
OnDevice = Callable[[NDArray[Any], torch.dtype], Tensor]
"""A planned array of the host's as a tensor."""


def step_bytes(
    layout: PageLayout, heads: int, groups: int, queries: int, rows: int, longest: int
) -> int:
    """What a step of so many queries of so many requests takes in a layer, beside its cache: the
    pages that it gathers, and those that it decodes of a prompt of up to ``longest`` tokens, then
    what a page's queries, ``groups`` for each token and KV head, see of it."""
    S, of_token = layout.page_size, layout.plain_bytes // layout.page_size
    of_head = (longest + S) * of_token
    masks = S * groups * (longest + S) * (2 + layout.dtype.itemsize)  # and the kernel's own of it
    read = max(SCRATCH, of_head + max(of_head, masks))
    return read + (queries + rows * S) * heads * of_token


@dataclass
class Writes:
    """What a step writes, of B rows whose queries stand in n pages. On the device."""

    slots: Tensor
    """As the engine numbers them. [T] int64; negative for padding"""
    begins: Numbers
    """The first of each row's pages among the n, [B]"""
    first: Numbers
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

    @classmethod
    def of_singles(cls, slots: Tensor, computed: Numbers, page_size: int) -> Writes:
        """Of a step with one token for each row, in shapes that follow from their number."""
        return cls(slots, np.arange(len(computed)), computed // page_size, page_size)

    @classmethod
    def of(
        cls, slots: Tensor, computed: Numbers, total: Numbers, page_size: int, tensor: OnDevice
    ) -> Writes:
        """Of a step that brings tokens [computed, total) of each row, [B] each."""
        S, queries = page_size, total - computed
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

        def index(values: NDArray[Any]) -> Tensor:
            return tensor(values, torch.int64)

        return cls(
            slots=slots[: len(row)],
            begins=begins,
            first=first,
            page_size=S,
            pages=int(pages.sum()),
            begun=index(begins[begun]),
            begun_rows=index(begun),
            at=index(page * S + position % S),
            full=index(page[ends]),
            full_tokens=index(ends),
            last=index(latest),
            last_rows=index(row[latest]),
            last_offset=index(position[latest] % S),
        )

    def page_of(self, row: Any, position: Any) -> Any:
        """Among the n."""
        return self.begins[row] + position // self.page_size - self.first[row]

    def opened(self, segments: Segments) -> Numbers:
        """The first query's page of each segment, among the n. [segments]"""
        found: Numbers = self.page_of(segments.row, segments.start)
        return found


@dataclass
class OpenPages:
    """The pages that B rows are filling, each in one or more pieces of n tokens."""

    numbers: Tensor
    """Plain, keys before values. [N, n, 2, H, D]"""
    table: Tensor
    """The pieces of each row, in order. [B, at least S / n]"""

    def at(self, rows: Tensor | slice, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens lie in ``numbers``: piece and place. offset [rows], or [1, S]: of pages"""
        table, each = self.table[rows].long(), self.numbers.shape[1]
        if offset.ndim == 2:
            return table.gather(1, (offset // each).expand(len(table), -1)), offset % each
        return table.gather(1, (offset // each)[:, None])[:, 0], offset % each


@dataclass
class Gathered:
    """The plain pages of a step in one layer."""

    keys: Tensor
    """[n, S, H, D] by its strides"""
    values: Tensor


def write(
    key: Tensor, value: Tensor, cache: Coded, layout: PageLayout, open_pages: OpenPages,
    writes: Writes,
) -> Gathered:  # fmt: skip
    """The new tokens [T, H, D], where later steps and this one's queries find them."""
    numbers, S = open_pages.numbers, layout.page_size
    new = torch.stack([key, value], 1)[: len(writes.slots)].to(numbers.dtype)
    within = torch.arange(S, device=new.device)[None]
    if writes.at is None:  # a token a row, wherever it stands
        rows = slice(0, len(writes.slots))
        slots = writes.slots.clamp(min=0)
        offset, known = slots % S, writes.slots >= 0
        gathered = numbers[open_pages.at(rows, within)]  # [B, S, 2, H, D]
        gathered[torch.arange(len(slots), device=new.device), offset] = new
        pages = torch.where(known & (offset == S - 1), slots // S, -1)
        encode_pages(cache, gathered[:, :, 0], gathered[:, :, 1], pages, layout)
        piece, place = open_pages.at(rows, offset)
        numbers[torch.where(known, piece, 0), place] = new
        return Gathered(gathered[:, :, 0], gathered[:, :, 1])
    assert writes.begun is not None
    assert writes.begun_rows is not None
    gathered = new.new_empty(writes.pages, S, *new.shape[1:])
    if len(writes.begun):
        gathered[writes.begun] = numbers[open_pages.at(writes.begun_rows, within)]
    gathered.flatten(0, 1)[writes.at] = new
    keys, values = gathered[:, :, 0], gathered[:, :, 1]
    assert writes.full is not None
    assert writes.full_tokens is not None
    assert writes.last is not None
    assert writes.last_rows is not None
    assert writes.last_offset is not None
    if len(writes.full):
        pages = writes.slots[writes.full_tokens] // S
        encode_pages(cache, keys, values, pages, layout, writes.full)
    numbers[open_pages.at(writes.last_rows, writes.last_offset)] = new[writes.last]
    return Gathered(keys, values)


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
    """What those queries of a step read that read all they see."""

    singles: Singles | None
    runs: list[Run]

    @classmethod
    def of(
        cls, segments: Segments, opened: Numbers, table: Tensor, tensor: OnDevice
    ) -> CodedReads:
        """opened: as ``Writes.opened``; table: pages that each segment sees. [segments, P]"""
        S, single, visible = segments.page_size, segments.queries == 1, segments.visible
        runs = [
            Run(
                token=int(segments.token[n]),
                start=int(visible[n] - segments.queries[n]),
                queries=int(segments.queries[n]),
                open=int(opened[n]),
                table=table[n, : int(visible[n] - 1) // S],
            )
            for n in np.flatnonzero(~single).tolist()
        ]
        alone = np.flatnonzero(single)
        if not len(alone):
            return cls(None, runs)
        tokens = segments.token[alone]
        in_order = not runs and bool((tokens == np.arange(len(tokens))).all())
        singles = Singles(
            None if in_order else tensor(tokens, torch.int64),
            tensor(opened[alone], torch.int32),
            (table if in_order else table[tensor(alone, torch.int64)]).contiguous(),
            tensor(visible[alone], torch.int32),
        )
        return cls(singles, runs)


def read(
    query: Tensor, cache: Tensor, layout: PageLayout, gathered: Gathered, reads: CodedReads,
    scale: float, output: Tensor,
) -> None:  # fmt: skip
    """query and output [T, Hq, D], cache [N, H, page_bytes]."""
    for run in reads.runs:
        _read_run(query, cache, layout, gathered, run, scale, output)
    if reads.singles is None:
        return
    one = reads.singles
    picked = query[: len(one.lengths)] if one.tokens is None else query[one.tokens]
    out = coded_decode(
        picked, cache, layout, gathered.keys, gathered.values, one.open, one.table, None, None,
        one.lengths, scale,
    )  # fmt: skip
    output[slice(0, len(out)) if one.tokens is None else one.tokens] = out


def _read_run(
    query: Tensor, cache: Tensor, layout: PageLayout, gathered: Gathered, run: Run, scale: float,
    output: Tensor,
) -> None:  # fmt: skip
    """From the last page to the first, each in its turn in place of what it was coded to."""
    S, D, every = layout.page_size, layout.head_size, cache.shape[1]
    G = query.shape[1] // every
    first, coded = run.start // S, len(run.table)
    of_head = 4 * (coded + 1) * S * D * query.element_size()
    heads = min(max(1, SCRATCH // of_head), every)
    room = query.new_empty(2, (coded + 1) * S, heads, D)
    end = run.start + run.queries
    for head in range(0, every, heads):
        mine = slice(head, min(head + heads, every))
        H = mine.stop - head
        found = room[:, :, :H]
        if coded:
            decoded = decode_pages(cache[:, mine], run.table, layout)
            for n in range(2):
                found[n, : coded * S] = decoded[n].flatten(0, 1)
            del decoded  # before the next heads'
        for page in range(coded, first - 1, -1):
            begin, stop = max(page * S, run.start), min((page + 1) * S, end)
            own = slice(page * S, stop)
            for one, plain in zip(found, (gathered.keys, gathered.values), strict=True):
                one[own] = plain[run.open + page - first, : stop - page * S, mine]
            rows = slice(run.token + begin - run.start, run.token + stop - run.start)
            asked = query[rows, mine.start * G : mine.stop * G].unflatten(1, (H, G))
            n = stop - begin
            asked = asked.permute(1, 2, 0, 3).reshape(1, H, G * n, D)
            keys, values = (one[:stop].transpose(0, 1)[None] for one in found)
            sees = torch.arange(begin, stop, device=query.device)[:, None] >= torch.arange(
                stop, device=query.device
            )
            out = scaled_dot_product_attention(
                asked, keys, values, attn_mask=sees.repeat(G, 1), scale=scale
            )
            out = out.view(H, G, n, D).permute(2, 0, 1, 3)
            output[rows, mine.start * G : mine.stop * G] = out.flatten(1, 2)


def tokens_of(cache: Tensor, layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
    """cache [N, H, page_bytes], pages [n, P] -> their keys and values, [n, P * S, H, D] each."""
    keys, values = decode_pages(cache, pages.flatten(), layout)
    shape = (len(pages), -1)
    return keys.unflatten(0, shape).flatten(1, 2), values.unflatten(0, shape).flatten(1, 2)


def store(keys: Tensor, values: Tensor, cache: Tensor, layout: PageLayout, pages: Tensor) -> None:
    """Whole pages [P * S, H, D] of what was packed, coded again, at pages [P]."""
    shape = (-1, layout.page_size)
    encode_pages(cache, keys.unflatten(0, shape), values.unflatten(0, shape), pages, layout)
