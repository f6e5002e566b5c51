"""How many: what every query of a step reads, from lengths and the policy alone, on the host.

A step brings each request some query tokens. ``Planner.plan`` cuts them into segments: runs of
queries of one request that see the same pages. An engine's adapter turns segments into its own
tables and lengths; which pages a selecting query reads is decided later, on the device.

Physical order, logical position and page table are three things here: a segment names logical
pages, its visible length is what a kernel must be told, and the adapter owns where pages live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvplug.config import Settings
from kvplug.policy import Positions

Whole = TypeVar("Whole")
Selected = TypeVar("Selected")

_PER_SEGMENT = (
    "row", "token", "start", "stop", "kept", "first", "packed", "choice", "selects", "decodes"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Runs of query tokens, in the order of the batch; every array is [n] int64 unless said.

    A segment's queries stand at logical positions [start, stop) of request ``row`` and at
    [token, token + stop - start) of the step's flat queries. They see ``kept`` pages instead of
    those before ``first``, and all pages from ``first`` on, causally (``kept == first == 0``:
    everything). The kept pages are the first of the planner's ``held`` pages or, where
    ``packed >= 0``, private pages that hold what a compressed prompt keeps.
    """

    row: Positions
    token: Positions
    start: Positions
    stop: Positions
    kept: Positions
    first: Positions
    packed: Positions
    """Column of the request's table where its private pages begin; -1 without."""
    choice: Positions
    """Which of the batch's settings the request has."""
    selects: NDArray[np.bool_]
    """The segment is one query that reads a selection of the pages it sees."""
    decodes: NDArray[np.bool_]
    """The queries stand behind the prompt's end."""
    page_size: int

    @property
    def queries(self) -> Positions:
        return self.stop - self.start

    @property
    def flat(self) -> Positions:
        """Rows of the step's flat queries that the segments hold, in their order."""
        ends = np.cumsum(self.queries)
        return np.arange(ends[-1]) - np.repeat(ends - self.queries - self.token, self.queries)

    @property
    def visible(self) -> Positions:
        """Tokens that the last query of each segment sees: the length a kernel must be told."""
        return self.stop - (self.first - self.kept) * self.page_size

    @property
    def pages(self) -> Positions:
        return -(-self.visible // self.page_size)

    @property
    def untouched(self) -> bool:
        """Every query sees and reads everything: the engine's own path serves the step."""
        return not (self.selects.any() or self.first.any())

    def where(self, mask: NDArray[np.bool_]) -> Segments:
        """The segments of a mask."""
        return Segments(
            page_size=self.page_size,
            **{name: getattr(self, name)[mask] for name in _PER_SEGMENT},
        )

    def by_choice(self) -> dict[int, Segments]:
        """The segments of each choice that occurs."""
        found = np.unique(self.choice).tolist()
        return {one: self.where(self.choice == one) for one in found}

    def one_per_row(self, rows: int, selects: bool) -> Segments:
        """A decode batch in a shape that depends on nothing but its size: a query for each of
        ``rows`` rows, which reads nothing where the row has no segment. All select, or none.
        """
        fields = {name: np.zeros(rows, np.int64) for name in _PER_SEGMENT}
        fields["packed"] -= 1
        for name, values in fields.items():
            values[self.row] = getattr(self, name)
        index = np.arange(rows)
        fields |= {"row": index, "token": index}
        return Segments(
            page_size=self.page_size,
            **{**fields, "selects": np.full(rows, selects), "decodes": np.full(rows, True)},  # type: ignore[arg-type]
        )


class Planner:
    """Answers for one policy and one page size; holds no state of requests."""

    def __init__(
        self,
        settings: Settings,
        page_size: int,
        budget: int | None = None,
        narrowest: int | None = None,
    ) -> None:
        """budget: tokens that the planned layers keep of a prompt, where layers differ.
        narrowest: the least that any layer keeps, where the private pages span all of them: a
        prompt that some layer compresses is then packed in every one.
        """
        self.settings = settings
        self.page_size = page_size
        self.eviction = settings.policy.eviction
        self.selector = settings.policy.selector
        self.held = self._held_pages()
        """Pages at the start and under protected spans, ascending: never evicted. [n] int64"""
        self.scored = settings.policy.scored
        self.private = self.scored.pages(page_size, budget) if self.scored else 0
        """Private pages that hold what a compressed prompt keeps, at most."""
        least = narrowest or budget
        self._short = self.scored.pages(page_size, least) if self.scored else 0
        """Whole pages that a prompt may have and stay as it is."""
        self.keep = self.selector.pages(page_size) if self.selector else 0
        """Pages that a selecting query reads per KV head, at most."""

    def _held_pages(self) -> Positions:
        if self.eviction is None:
            return np.zeros(0, np.int64)
        spans = [(0, self.eviction.kept_from_start()), *self.settings.protect]
        pages = [np.arange(a // self.page_size, -(-b // self.page_size)) for a, b in spans]
        return np.unique(np.concatenate(pages)).astype(np.int64)

    def first_pages(self, positions: Positions) -> Positions:
        """The oldest page, beside the held ones, that a query at each position sees. [n] -> [n]"""
        if self.eviction is None:
            return np.zeros_like(positions)
        first = self.eviction.first_token(positions) // self.page_size
        return np.where(positions < self.settings.min_context, 0, first)

    def plan(self, computed: Positions, total: Positions, prompt: Positions) -> Segments:
        """Segments of a step. Each request b brings the queries [computed[b], total[b]);
        its original prompt has prompt[b] tokens, also after a preemption. [B] each
        """
        queries = total - computed
        row = np.repeat(np.arange(len(queries)), queries)
        offset = np.cumsum(queries) - queries
        token = np.arange(len(row))
        position = token - offset[row] + computed[row]

        first = self.first_pages(position)
        kept = np.searchsorted(self.held, first)
        hidden = kept < first
        first, kept = np.where(hidden, first, 0), np.where(hidden, kept, 0)
        decodes = position >= prompt[row]
        packed = np.full(len(row), -1)
        if self.scored:
            private = self.private_pages(prompt)[row]
            compressed = decodes & (private > 0)
            first = np.where(compressed, prompt[row] // self.page_size, first)
            kept = np.where(compressed, private, kept)
            packed = np.where(compressed, -(-prompt[row] // self.page_size), packed)
        selects = decodes if self.selector else np.zeros(len(row), bool)
        if self.settings.shortcut:
            pages = position // self.page_size + 1 - first + kept
            selects = selects & (pages > self.keep) & (position >= self.settings.min_context)
            page = np.zeros_like(position)
        else:
            page = position // self.page_size

        begins = np.ones(len(row), bool)
        changes = [np.diff(each) != 0 for each in (row, first, page, decodes)]
        begins[1:] = np.logical_or.reduce(changes)
        begins |= selects
        begins[1:] |= selects[:-1]
        begin = np.flatnonzero(begins)
        end = np.append(begin[1:], len(row)) - 1
        return Segments(
            row=row[begin],
            token=token[begin],
            start=position[begin],
            stop=position[end] + 1 if len(begin) else position[begin],
            kept=kept[begin],
            first=first[begin],
            packed=packed[begin],
            choice=np.zeros(len(begin), np.int64),
            selects=selects[begin],
            decodes=decodes[begin],
            page_size=self.page_size,
        )

    def private_pages(self, prompt: Positions) -> Positions:
        """Pages that hold what a prompt of so many tokens keeps; 0 where it stays whole. [n]

        A prompt's whole pages are compressed; its partial last page stays as it is.
        """
        if self.scored is None:
            return np.zeros_like(prompt)
        whole = prompt // self.page_size
        if not self.settings.shortcut:
            return np.minimum(whole, self.private)
        long = (whole > self._short) & (prompt > self.settings.min_context)
        return np.where(long, np.minimum(whole, self.private), 0)

    def compresses(self, computed: Positions, total: Positions, prompt: Positions) -> Positions:
        """Rows whose prompt is packed in this step: the one that passes its end. -> [n]"""
        passes = (computed <= prompt) & (prompt < total)
        return np.flatnonzero(passes & (self.private_pages(prompt) > 0))

    def selection(self, segments: Segments, budget: int | None = None) -> Positions:
        """Pages that each selecting query reads per KV head, in a layer of this budget. -> [n]"""
        assert self.selector is not None
        keep = min(self.keep, self.selector.pages(self.page_size, budget))
        short = segments.stop <= self.settings.min_context
        return np.where(short, segments.pages, np.minimum(keep, segments.pages))

    def layer_budget(self, layer: int) -> int | None:
        """Tokens that a selecting query reads in a layer; None for all of them."""
        return self.selector.layer_budget(layer) if self.selector else None

    def width(self, max_tokens: int) -> int:
        """The widest selection, in pages, of any request up to ``max_tokens``."""
        whole = -(-max(self.settings.min_context, 1) // self.page_size)
        return min(max(self.keep, whole), -(-max_tokens // self.page_size))

    def evictable(self, processed: int) -> list[tuple[int, int]]:
        """Ranges of pages [first, last) that no query from position ``processed`` on will see."""
        first = int(self.first_pages(np.array([processed]))[0])
        edges = [-1, *(page for page in self.held.tolist() if page < first), first]
        return [(a + 1, b) for a, b in pairwise(edges) if a + 1 < b]

    def needed(self, tokens: int) -> Positions:
        """Pages before position ``tokens`` that queries from there on see. -> [n] ascending"""
        first = int(self.first_pages(np.array([tokens]))[0])
        last = tokens // self.page_size
        return np.concatenate([self.held[self.held < min(first, last)], np.arange(first, last)])

    def most_pages(self, in_flight: int, max_tokens: int) -> int:
        """The most pages a request holds while up to ``in_flight`` tokens are being computed."""
        processed = np.arange(max_tokens)
        first = self.first_pages(processed)
        last = (np.minimum(processed + in_flight, max_tokens) - 1) // self.page_size
        return int((np.searchsorted(self.held, first) + last - first + 1).max(initial=0))


class Choices:
    """The settings that requests chose so far, by number; the first is the server's own."""

    def __init__(self, own: Settings) -> None:
        self.settings = [own]
        self._numbers = {own: 0}

    def number(self, settings: Settings) -> int:
        """The same for equal settings, as long as the server lives."""
        number = self._numbers.setdefault(settings, len(self.settings))
        if number == len(self.settings):
            self.settings.append(settings)
        return number


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Queries of a prompt's window that a step computes, wanted once the prompt has ended."""

    row: int
    """Of the batch."""
    tokens: slice
    """Rows of the step's flat queries."""
    offset: int
    """The first one's place in the window."""
    window: int


@dataclass(frozen=True)
class LayerReads(Generic[Whole, Selected]):
    """What a layer reads of a step, in an adapter's terms."""

    whole: Whole | None = None
    """The queries that read all they see; None where there are none."""
    selected: Sequence[tuple[Selected, int]] = ()
    """The queries of each policy that selects here, and the tokens that they read."""


class BatchPlanner:
    """Answers for a batch whose requests have settings of their own."""

    def __init__(
        self, page_size: int, budget: int | None = None, narrowest: int | None = None
    ) -> None:
        """budget, narrowest: of a policy whose layers differ, as in ``Planner``."""
        self.page_size = page_size
        self.budgets = budget, narrowest
        self.planners: list[Planner] = []
        """By the number that ``choice`` arrays give a request's settings."""

    def know(self, settings: Sequence[Settings]) -> None:
        """Settings by number: a list that only grows."""
        for one in settings[len(self.planners) :]:
            budgets = (None, None) if one.policy.uniform else self.budgets
            self.planners.append(Planner(one, self.page_size, *budgets))

    def plan(
        self, choice: Positions, computed: Positions, total: Positions, prompt: Positions
    ) -> Segments:
        """``Planner.plan``, each request by the planner of its choice. [B] each"""
        chosen = np.unique(choice).tolist()
        if len(chosen) == 1:
            segments = self.planners[chosen[0]].plan(computed, total, prompt)
            return replace(segments, choice=np.full(len(segments.row), chosen[0]))
        queries = total - computed
        token = np.cumsum(queries) - queries
        parts = []
        for one in chosen:
            rows = np.flatnonzero(choice == one)
            part = self.planners[one].plan(computed[rows], total[rows], prompt[rows])
            own = np.cumsum(queries[rows]) - queries[rows]
            parts.append(
                replace(
                    part,
                    row=rows[part.row],
                    token=part.token - own[part.row] + token[rows[part.row]],
                    choice=np.full(len(part.row), one),
                )
            )
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_SEGMENT
        }
        order = np.argsort(joined["token"], kind="stable")
        return Segments(
            page_size=self.page_size, **{name: each[order] for name, each in joined.items()}
        )

    def by_layer(
        self, segments: Segments, layers: Iterable[int],
        whole: Callable[[Segments], Whole], selected: Callable[[Segments], Selected],
    ) -> dict[int, LayerReads[Whole, Selected]]:  # fmt: skip
        """What each layer reads of a step: where a policy does not select, its queries read all.

        ``selected`` puts the selecting segments of one choice into an adapter's terms, ``whole``
        those that remain, if any: once for all layers in which the same choices select.
        """
        chosen = segments.where(segments.selects).by_choice()
        terms = {one: selected(part) for one, part in chosen.items()}
        others: dict[tuple[int, ...], Whole | None] = {}
        reads = {}
        for layer in layers:
            asked = [(one, self.planners[one].layer_budget(layer)) for one in chosen]
            here = tuple(one for one, budget in asked if budget is not None)
            if here not in others:
                rest = segments.where(~(segments.selects & np.isin(segments.choice, here)))
                others[here] = whole(rest) if len(rest.row) else None
            mine = [(terms[one], budget) for one, budget in asked if budget is not None]
            reads[layer] = LayerReads(others[here], mine)
        return reads

    def private_pages(self, choice: Positions, prompt: Positions) -> Positions:
        """``Planner.private_pages`` by choice. [B] each -> [B]"""
        pages = np.zeros_like(prompt)
        for one in np.unique(choice).tolist():
            rows = choice == one
            pages[rows] = self.planners[one].private_pages(prompt[rows])
        return pages

    def observed(
        self, choice: Positions, computed: Positions, total: Positions, prompt: Positions
    ) -> list[Observed]:
        """What the scores of the prompts that will be compressed ask for of this step. [B] each"""
        scored = [planner.scored for planner in self.planners]
        window = np.array([each.window if each and each.needs_queries else 0 for each in scored])[
            choice
        ]
        if not window.any():
            return []
        begin = np.maximum(computed, np.maximum(prompt - window, 0))
        end = np.minimum(total, prompt)
        seen = (begin < end) & (window > 0) & (self.private_pages(choice, prompt) > 0)
        queries = total - computed
        token = np.cumsum(queries) - queries - computed
        return [
            Observed(
                row=row,
                tokens=slice(int(token[row] + begin[row]), int(token[row] + end[row])),
                offset=int(begin[row] - prompt[row] + window[row]),
                window=int(window[row]),
            )
            for row in np.flatnonzero(seen).tolist()
        ]

    def compresses(
        self, choice: Positions, computed: Positions, total: Positions, prompt: Positions
    ) -> Positions:
        """``Planner.compresses`` by choice. [B] each -> [n]"""
        passes = (computed <= prompt) & (prompt < total)
        return np.flatnonzero(passes & (self.private_pages(choice, prompt) > 0))
