"""When a request's cache is packed, and what its queries see from then on, by lengths alone.

A request is packed at positions that follow from its prompt and its policy: at the prompt's end,
if that is long enough, and every ``interval`` tokens of what follows, if the policy says so; or
every ``chunk`` tokens of prompt and answer alike, wherever the prompt ends. Each time is an event,
0 the first; a query is of the *era* of the last event at or before its position (-1: none). With S
tokens a page, C pages between events and k private pages,

    at(0) = begin        the prompt's end, or the end of the first k + C pages
    at(m) = first(m) S
    first(m) = begin // S + m C

a query of era m sees k private pages instead of those before first(m), and all from there on.
Event m packs what a query of era m - 1 sees before at(m), the private pages and C others, into the
same private pages.

Where a budget is a share of a chunk, nothing is inserted: at(m) = (m + 1) C S, and event m packs
the C pages before it into the first k of them, behind the step that computes the last of their
tokens. A query sees k pages of each chunk before its own.

Where contexts are compiled, a request packs nothing, unless it repeats a chunk: its prompt is of
whole chunks, the last one twice, and its one event, at its end, packs the first of the two into
the second's first k pages. A request that found n chunks compiled sees k pages of each of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvplug.compress import ScoredEviction
from kvplug.config import Settings
from kvplug.policy import LIMIT, Positions

NEVER = LIMIT
"""A position that no request has."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What is packed of a request, as it stands in a row [pages | private | pages]."""

    row: int
    """Of the batch."""
    era: int
    private: int
    """Private pages that are read, those that the event before wrote; 0 at the first."""
    pages: range
    """Pages of the request that are read behind them."""
    tokens: int
    """That lie in what is read."""
    kept: int
    """Pages that are written."""
    into: int
    """Column of the row that the first of them has."""
    stay: int
    """Tokens that are left of those read, a prompt's partial last page among them."""
    protect: Sequence[tuple[int, int]]
    """Spans of what is read that no head may evict."""
    phase: int
    """Of the step: after its reads of earlier phases, before those of its own."""
    repeated: range = range(0)
    """Pages of the request whose tokens repeat what is packed, and whose queries score it."""
    first: int = 0
    """Tokens at its start that those queries see beside."""

    @property
    def in_place(self) -> bool:
        """Whether pages are written that are read, too."""
        return bool(self.private) or self.into == self.pages.start


@dataclass(frozen=True, kw_only=True)
class Course:
    """One request's events, in plain numbers: what a scheduler asks for at every step."""

    begin: int
    """Position of the first; NEVER without."""
    private: int
    """Pages inserted into its row from then on."""
    every: int
    """Pages between events; 0 where there is one."""
    page_size: int

    @property
    def column(self) -> int:
        """Where the private pages are: the first whole page behind the first event."""
        return -(-self.begin // self.page_size)

    def packed(self, processed: int) -> int:
        """Pages that queries from position ``processed`` on see in packed form alone, where the
        one before it has been computed."""
        if processed <= self.begin:
            return 0
        first = self.begin // self.page_size
        if not self.every:
            return first
        passed = (processed - 1) // self.page_size - first
        return first + max(passed, 0) // self.every * self.every

    def freed(self, processed: int) -> list[tuple[int, int]]:
        """Ranges of the row's columns, private ones among them, that they do not see."""
        last = self.packed(processed)
        if last <= self.column:
            return [(0, last)] if last else []
        return [(0, self.column), (self.column + self.private, last + self.private)]


class Schedule:
    """Of one policy and one page size; holds no state of requests."""

    def __init__(
        self,
        settings: Settings,
        page_size: int,
        budget: int | None = None,
        narrowest: int | None = None,
    ) -> None:
        """budget, narrowest: as of ``Planner``."""
        self.settings = settings
        self.page_size = page_size
        self.scored = scored = settings.policy.scored
        self.placement = settings.policy.placement
        self.packs = settings.policy.packs
        self.digests = 0
        """In a page of the directory, where prompts go to the host."""
        self.directory = 0
        """Such pages, of all requests together."""
        if self.placement is not None:
            selector = settings.policy.selector
            assert selector is not None
            self.digests = self.placement.digests(selector, page_size)
            self.directory = self.placement.directory(self.digests, page_size)
        self.kept = scored.pages(page_size, budget) if scored else 0
        """Pages that an event leaves, at most."""
        self.appends = scored is not None and scored.appends
        """Whether each event leaves pages of its own, where those that it packs have been."""
        self.compiles = scored is not None and scored.compiles
        """Whether requests of their own pack a context for others."""
        self.most_private = 0 if self.appends else self.kept
        """Private pages of a request, at most."""
        least = narrowest or budget
        self._short = scored.pages(page_size, least) if scored else 0
        """Whole pages that a prompt may have and stay as it is."""
        self.every = -(-(scored.every or 0) // page_size) if scored else 0
        """Pages between events; 0 where prompts alone are packed."""
        self.streams = scored is not None and scored.chunk is not None
        """Whether prompts are packed as they come, so that events do not depend on their end."""
        self.window = 0
        """Tokens before an event whose queries score what it packs."""
        if scored is not None and scored.needs_queries:
            self.window = self.every * page_size if self.compiles else scored.window

    def private_pages(self, prompt: Positions) -> Positions:
        """Pages that hold what a prompt of so many tokens keeps at its end; 0 where it stays
        whole. [n]

        A prompt's whole pages are packed; its partial last page stays as it is.
        """
        if self.placement is not None:
            whole = prompt // self.page_size
            private = self.placement.pages + self.listed(whole)
            least = private if self.settings.shortcut else 0
            moves = (whole > least) & (prompt > self.settings.min_context)
            return np.where(moves, private, 0)
        if self.scored is None or self.appends:
            return np.zeros_like(prompt)
        whole = prompt // self.page_size
        if not self.settings.shortcut:
            return np.minimum(whole, self.most_private)
        long = (whole > self._short) & (prompt > self.settings.min_context)
        return np.where(long, np.minimum(whole, self.most_private), 0)

    def listed(self, whole: Positions) -> Positions:
        """Pages of the directory that speak for so many of a prompt on the host, behind the hot
        ones. [n] -> [n]"""
        return -(-whole // self.digests)

    def begin(self, prompt: Positions) -> Positions:
        """Position of the first event; NEVER without. [n] -> [n]"""
        if self.compiles:
            return prompt if self.settings.repeats else np.full_like(prompt, NEVER)
        if not self.every:
            return np.where(self.private_pages(prompt) > 0, prompt, NEVER)
        if self.appends:
            return np.full_like(prompt, self.every * self.page_size)
        pages = max(
            self.most_private + self.every, self.settings.min_context // self.page_size + 1
        )
        ends = self.private_pages(prompt) > 0
        if not self.settings.shortcut:  # as soon as it fills the private pages
            pages, ends = self.most_private, prompt // self.page_size >= self.most_private
        early = min(pages * self.page_size, NEVER)
        return np.where(ends & (not self.streams), prompt, early)

    def private(self, prompt: Positions) -> Positions:
        """Pages inserted into a row from the first event on. [n] -> [n]"""
        if self.every:
            return np.full_like(prompt, self.most_private)
        return self.private_pages(prompt)

    # What follows is asked of ``begin``, the position of a request's first event. [n] each -> [n]

    def column(self, begin: Positions) -> Positions:
        """Where the private pages are: the first whole page behind the first event."""
        return -(-begin // self.page_size)

    def era(self, position: Positions, begin: Positions) -> Positions:
        passed = position >= begin
        if not self.every:
            return passed.astype(np.int64) - 1
        pages = np.maximum(position // self.page_size - begin // self.page_size, 0)
        return np.where(passed, pages // self.every, -1)

    def first(self, era: Positions, begin: Positions) -> Positions:
        """Pages that queries of an era see in packed form alone."""
        return np.where(era < 0, 0, begin // self.page_size + era * self.every)

    def at(self, era: Positions, begin: Positions) -> Positions:
        """Position of an event."""
        return np.where(era <= 0, begin, self.first(era, begin) * self.page_size)

    def phase(self, era: Positions, computed: Positions, begin: Positions) -> Positions:
        """Of a step that computes from position ``computed`` on.

        A request's first packing leaves what it reads in place, unless it appends: it may come
        before everything.
        """
        before = self.era(computed, begin)
        return era - before if self.appends else np.maximum(era - np.maximum(before, 0), 0)

    def between(
        self, computed: Positions, total: Positions, begin: Positions
    ) -> tuple[Positions, Positions]:
        """Row and era of the events at positions [computed, total), in order. [B] -> [n] each"""
        first = self.era(computed - 1, begin) + 1
        count = np.maximum(self.era(total - 1, begin) + 1 - first, 0)
        row = np.repeat(np.arange(len(count)), count)
        return row, first[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)

    def events(self, computed: Positions, total: Positions, prompt: Positions) -> list[Event]:
        """What a step packs that brings the queries [computed, total): all that they pass, or
        that end with one of them. [B] each; a row's in order"""
        row, era = self.between(computed + self.appends, total + self.appends, self.begin(prompt))
        return [
            self._event(n, m, int(computed[n]), int(prompt[n]))
            for n, m in zip(row.tolist(), era.tolist(), strict=True)
        ]

    def _event(self, row: int, era: int, computed: int, prompt: int) -> Event:
        course, size = self.course(prompt), self.page_size
        repeated, first = range(0), 0
        if self.compiles:
            assert self.scored is not None
            end = prompt // size - self.every
            private, pages, into = 0, range(end - self.every, end), end
            repeated, tokens = range(end, end + self.every), len(pages) * size
            first = self.scored.sinks if pages.start else 0
        elif self.appends:
            pages = range(era * self.every, (era + 1) * self.every)
            private, tokens, into = 0, len(pages) * size, pages.start
        elif not era:
            private, pages, into = 0, range(course.column), course.column
            tokens = course.begin
        else:
            last = course.begin // size + era * self.every
            private, pages = course.private, range(last - self.every, last)
            tokens, into = (private + len(pages)) * size, course.column
        kept = self.kept if self.appends else course.private
        passed = self.phase(*(np.array([n]) for n in (era, computed, course.begin)))
        return Event(
            row=row, era=era, private=private, pages=pages, tokens=tokens, kept=kept, into=into,
            stay=kept * size + tokens % size, protect=self._protect(private, pages),
            phase=int(passed[0]), repeated=repeated, first=first,
        )  # fmt: skip

    def _protect(self, private: int, pages: range) -> Sequence[tuple[int, int]]:
        """Spans of [private pages | pages]. What is never to go stands first in private pages."""
        spans, size = self.settings.protect, self.page_size
        if self.scored is None or not spans or not (private or pages.start):
            return spans
        begin, end = pages.start * size, pages.stop * size
        before = np.zeros(begin, bool)
        for first, last in [(0, self.scored.sinks), *spans]:
            before[first:last] = True
        found = [(0, min(int(before.sum()), private * size))] if private else []
        shift = private * size - begin
        inside = [(max(first, begin), min(last, end)) for first, last in spans]
        return found + [(a + shift, b + shift) for a, b in inside if a < b]

    def scorer(self, event: Event) -> ScoredEviction:
        """What chooses at an event: of those that append, only one has the first tokens."""
        assert self.scored is not None
        later = self.appends and event.pages.start
        return self.scored.without_sinks() if later else self.scored

    def course(self, prompt: int) -> Course:
        """Of one request."""
        asked = np.array([prompt])
        return Course(
            begin=int(self.begin(asked)[0]),
            private=int(self.private(asked)[0]),
            every=self.every,
            page_size=self.page_size,
        )

    def most_pages(self, prompt: int, in_flight: int, tokens: int, since: int = 0) -> int:
        """The most pages that a request of so many tokens holds while up to ``in_flight`` tokens
        are being computed; since: once so many are behind it."""
        course = self.course(prompt)
        # Past its first event and as much again, it repeats itself.
        once = max(course.begin, since) + self.every * self.page_size + 1
        processed = np.arange(since, min(tokens, once) if self.every else tokens)
        begin = np.full_like(processed, course.begin)
        total = np.minimum(processed + in_flight, tokens)
        inserted = course.private * (total > begin)
        gone = self.first(self.era(processed - 1, begin), begin)
        return int((-(-total // self.page_size) + inserted - gone).max(initial=0))
