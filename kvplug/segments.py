"""Runs of a step's queries that see the same pages, between planners and engines' adapters.

Physical order, logical position and page table are three things here: a segment names logical
pages, its visible length is what a kernel must be told, and the adapter owns where pages live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvplug.policy import Positions

HELD, SINKS = -1, -2
"""Which pages a segment keeps where none are private: the planner's held ones, or the request's
first."""

_PER_SEGMENT = (
    "row", "token", "start", "stop", "behind", "kept", "first", "packed", "away", "phase",
    "choice", "selects", "decodes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Runs of query tokens, in the order of the batch; every array is [n] int64 unless said.

    A segment's queries stand at logical positions [start, stop) of request ``row`` and at
    [token, token + stop - start) of the step's flat queries. They see ``kept`` pages instead of
    those before ``first``, and all pages from ``first`` on, causally (``kept == first == 0``:
    everything). The kept pages are the first of the planner's ``held`` pages, of the request's own
    where ``packed == SINKS`` or, where ``packed >= 0``, of the private pages that hold what the
    request was packed into.
    """

    row: Positions
    token: Positions
    start: Positions
    stop: Positions
    behind: Positions
    """Queries of the same prompt that the step brings behind these."""
    kept: Positions
    first: Positions
    packed: Positions
    """Column of the request's table where its private pages begin, which push others to the right;
    without them HELD or SINKS."""
    away: Positions
    """Of the pages before ``first``, those on the host: all of them, or none. The queries see
    those too, and what they choose of them in private pages."""
    phase: Positions
    """Of the step: its events of this phase (``kvplug.schedule``) come before, later ones behind;
    0 where a request reads before no event or behind its first."""
    choice: Positions
    """Which of the batch's settings the request has."""
    selects: NDArray[np.bool_]
    """The segment reads a selection of the pages it sees: one query that decodes, or a block of a
    prompt's."""
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

    def by_head(self, heads: int) -> Positions:
        """The order of queries in which each (segment, KV head) is a sequence of its own: of
        [queries * heads], the number of a query among the segments' times heads, plus the head."""
        each = np.repeat(self.queries, heads)
        begin = np.repeat(np.cumsum(self.queries) - self.queries, heads)
        head = np.tile(np.arange(heads), len(self.queries))
        within = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        return (np.repeat(begin, each) + within) * heads + np.repeat(head, each)

    @property
    def visible(self) -> Positions:
        """Tokens that the last query of each segment sees: the length a kernel must be told."""
        hidden = np.where(self.away > 0, 0, self.first - self.kept)
        return self.stop - hidden * self.page_size

    @property
    def pages(self) -> Positions:
        return -(-self.visible // self.page_size)

    @property
    def columns(self) -> Positions:
        """Pages that attention may read of each: where some are on the host, private ones and
        those behind them."""
        return self.pages + np.where(self.away > 0, self.kept - self.first, 0)

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

    def one_per_row(self, rows: int, selects: bool | None = None) -> Segments:
        """A decode batch in a shape that depends on nothing but its size: a query for each of
        ``rows`` rows, which reads nothing where the row has no segment.

        selects: all do, or none; None for those that did.
        """
        fields = {name: np.zeros(rows, np.int64) for name in _PER_SEGMENT}
        fields["packed"] += HELD
        for name, values in fields.items():
            values[self.row] = getattr(self, name)
        index = np.arange(rows)
        fields |= {"row": index, "token": index}
        chosen = fields["selects"] > 0 if selects is None else np.full(rows, selects)
        return Segments(
            page_size=self.page_size,
            **{**fields, "selects": chosen, "decodes": np.full(rows, True)},  # type: ignore[arg-type]
        )

    @classmethod
    def joined(cls, parts: Sequence[Segments]) -> Segments:
        """Those of some requests and those of others, in the order of the batch."""
        fields = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_SEGMENT
        }
        order = np.argsort(fields["token"], kind="stable")
        return cls(
            page_size=parts[0].page_size, **{name: each[order] for name, each in fields.items()}
        )
