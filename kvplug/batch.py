"""A batch whose requests have settings of their own: a planner for each, and one plan of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from kvplug.config import Settings
from kvplug.plan import Planner
from kvplug.policy import Positions
from kvplug.schedule import Event
from kvplug.segments import Segments

Kinds = tuple[bool, ...] | None
Whole = TypeVar("Whole")
Selected = TypeVar("Selected")


REMEMBERED = 64
"""Settings that keep their number though no request has them: clients may send any number."""


class Choices:
    """The settings that requests chose, by number; the first is the server's own."""

    def __init__(self, own: Settings) -> None:
        self.settings = [own]
        self._numbers = {own: 0}

    def number(self, settings: Settings, held: Iterable[int]) -> int:
        """The same for equal settings as long as a request has them.

        held: numbers that requests have. Once there are many, others are given anew.
        """
        number = self._numbers.get(settings)
        if number is None:
            number = self._unheld(held)
            if number == len(self.settings):
                self.settings.append(settings)
            else:
                del self._numbers[self.settings[number]]
                self.settings[number] = settings
            self._numbers[settings] = number
        return number

    def _unheld(self, held: Iterable[int]) -> int:
        end = len(self.settings)
        if end < REMEMBERED:
            return end
        taken = {0, *held}
        return next((number for number in range(end) if number not in taken), end)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Queries of an event's window that a step computes, wanted when it comes."""

    row: int
    """Of the batch."""
    era: int
    """Of the event (``kvplug.schedule``)."""
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
    selected: Sequence[tuple[Selected, int | float]] = ()
    """The queries of each policy that selects here, and the budget of what they read."""


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
        """Settings by number, as ``Choices`` gives them: all but the first may change."""
        for number, one in enumerate(settings):
            if number == len(self.planners):
                self.planners.append(self.planner(one))
            elif number and self.planners[number].settings is not one:
                self.planners[number] = self.planner(one)

    def planner(self, settings: Settings) -> Planner:
        """Of settings that may have no number yet."""
        budgets = (None, None) if settings.policy.uniform else self.budgets
        return Planner(settings, self.page_size, *budgets)

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
        return Segments.joined(parts)

    def by_layer(
        self, segments: Segments, layers: Iterable[int],
        whole: Callable[[Segments, tuple[tuple[int, bool], ...], Kinds], Whole],
        selected: Callable[[Segments], Selected], rows: int | None = None,
    ) -> dict[int, LayerReads[Whole, Selected]]:  # fmt: skip
        """What each layer reads of a step: where a policy does not select, its queries read all.

        ``selected`` puts the selecting segments of one choice that decode, or its blocks of
        prompts, into an adapter's terms, ``whole`` those that remain, if any: once for all layers
        in which the same (choice, decodes) select.

        rows: of a decode step under the first choice whose shapes must follow from its size
        alone: every row is then in all that a layer reads, with nothing to read where it has no
        part.
        """

        def shaped(part: Segments) -> Segments:
            return part if rows is None else part.one_per_row(rows)

        decoding = segments.selects & segments.decodes
        blocks = segments.selects & ~segments.decodes
        chosen = {(one, True): part for one, part in segments.where(decoding).by_choice().items()}
        if rows is None:
            parts = segments.where(blocks).by_choice()
            chosen |= {(one, False): part for one, part in parts.items()}
        else:  # a block of one query, ahead of its prompt's end, reads all that it sees
            own = self.planners[0].selector is not None
            chosen = {(0, True): segments.where(decoding)} if own else {}
        terms = {one: selected(shaped(part)) for one, part in chosen.items()}
        scored = self.planners[0].scored  # a server's own alone tells heads apart
        others: dict[tuple[tuple[tuple[int, bool], ...], Kinds], Whole | None] = {}
        reads = {}
        for layer in layers:
            asked = [
                ((one, decodes), self.planners[one].layer_budget(layer, decodes))
                for one, decodes in chosen
            ]
            here = tuple(one for one, budget in asked if budget is not None)
            kinds = None if scored is None else scored.kinds(layer)
            if (here, kinds) not in others:
                read = np.zeros(len(segments.row), bool)
                for one, decodes in here:
                    read |= (decoding if decodes else blocks) & (segments.choice == one)
                rest = shaped(segments.where(~read))
                others[here, kinds] = whole(rest, here, kinds) if len(rest.row) else None
            mine = [(terms[one], budget) for one, budget in asked if budget is not None]
            reads[layer] = LayerReads(others[here, kinds], mine)
        return reads

    def observed(
        self, choice: Positions, computed: Positions, total: Positions, prompt: Positions
    ) -> list[Observed]:
        """What the scores of this step's events, and of those to come, ask for of it. [B] each"""
        queries = total - computed
        token = np.cumsum(queries) - queries - computed
        found = []
        for one in np.unique(choice).tolist():
            schedule = self.planners[one].schedule
            if not schedule.window:
                continue
            window, rows = schedule.window, np.flatnonzero(choice == one)
            starts = schedule.begin(prompt[rows])
            row, era = schedule.between(computed[rows], total[rows] + window, starts)
            at, row = schedule.at(era, starts[row]), rows[row]
            begin = np.maximum(computed[row], np.maximum(at - window, 0))
            end = np.minimum(total[row], at)
            for n in np.flatnonzero(begin < end).tolist():
                first = int(token[row[n]])
                found.append(
                    Observed(
                        row=int(row[n]),
                        era=int(era[n]),
                        tokens=slice(first + int(begin[n]), first + int(end[n])),
                        offset=int(begin[n] - at[n] + window),
                        window=window,
                    )
                )
        return found

    def events(
        self, choice: Positions, computed: Positions, total: Positions, prompt: Positions
    ) -> list[Event]:
        """``Schedule.events`` by choice, a row's in order. [B] each"""
        found = []
        for one in np.unique(choice).tolist():
            schedule = self.planners[one].schedule
            if schedule.packs:
                rows = np.flatnonzero(choice == one)
                events = schedule.events(computed[rows], total[rows], prompt[rows])
                found += [replace(each, row=int(rows[each.row])) for each in events]
        return found

    def moved(
        self, choice: Positions, computed: Positions, total: Positions, prompt: Positions
    ) -> tuple[Positions, Positions]:
        """Rows of the step's flat queries that stand elsewhere in their request than they lie, and
        where. [B] each -> [n] each"""
        queries = total - computed
        parts = [np.zeros((2, 0), np.int64)]
        for one in np.unique(choice).tolist():
            planner = self.planners[one]
            if planner.reuse is None:
                continue
            mine = np.repeat(choice == one, queries)
            row = np.repeat(np.arange(len(queries)), queries)[mine]
            token = np.flatnonzero(mine)
            position = token - (np.cumsum(queries) - queries - computed)[row]
            stands = planner.logical(position, prompt[row])
            parts.append(np.stack([token, stands])[:, stands != position])
        tokens, stands = np.concatenate(parts, 1)
        return tokens, stands

    def begun(
        self, computed: Positions, total: Positions, prompt: Positions, tokens: int
    ) -> tuple[Positions, Positions, Positions]:
        """Rows that decode into a page of ``tokens`` tokens which has some, drafts among them if
        there were drafts; the first of their flat queries; and how many the page has after the
        step. [B] each -> [n] each"""
        inside, queries = computed % tokens, total - computed
        row = np.flatnonzero((computed >= prompt) & (inside > 0) & (queries > 0))
        first = np.cumsum(queries) - queries
        return row, first[row], np.minimum(inside + queries, tokens)[row]
