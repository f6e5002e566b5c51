"""Schedules of packing against their definition: a request is played step by step, each cell of
its row holding what was written there, and every read is compared with what a query of an
unchunked request would find."""

import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplug import BatchPlanner, Planner, PromptKV, Settings, keep_tokens, parse
from tests.core.test_plan import columns

claims = hypothesis_settings(max_examples=60, deadline=None)
sizes = st.sampled_from([4, 16])
LONGEST = 300


@st.composite
def scheduled(draw):
    budget = draw(st.integers(1, 60))
    knob = draw(st.sampled_from(["interval", "chunk"]))
    policy = f"knorm(budget={max(budget, 4)}, {knob}={draw(st.integers(1, 70))})"
    return Settings(
        policy=parse(policy),
        min_context=draw(st.just(0) | st.integers(0, 100)),
        shortcut=draw(st.booleans()),
    )


@functools.cache
def eras(
    settings: Settings, S: int, prompt: int, longest: int = LONGEST
) -> list[tuple[int, int, int]]:
    """The definition: (position, pages packed by then, private pages written) of each event, as a
    request grows token by token."""
    scored = settings.policy.scored
    k, C = -(-scored.budget // S), -(-(scored.interval or scored.chunk or 0) // S)
    found = []
    for position in range(longest):
        whole = position // S
        if found:
            due = C > 0 and position % S == 0 and whole == found[-1][1] + C
        elif position == prompt and not scored.chunk:
            due = whole >= k if C else whole > 0
            if settings.shortcut:
                due = whole > k and position > settings.min_context
        else:
            behind = position > prompt or scored.chunk
            due = C > 0 and behind and position % S == 0 and whole >= k
            if settings.shortcut:
                due = due and whole >= k + C and position > settings.min_context
        if due:
            found.append((position, whole, min(whole, k)))
    return found


def play(settings: Settings, S: int, prompt: int, cuts: list[int]) -> None:
    planner = Planner(settings, S)
    schedule, wanted = planner.schedule, eras(settings, S, prompt)
    row: dict[int, object] = {}
    for start, stop in itertools.pairwise([0, *cuts, LONGEST]):
        step = tuple(np.array([n]) for n in (start, stop, prompt))
        segments, events = planner.plan(*step), schedule.events(*step)
        private = int(schedule.private(step[2])[0])
        begin = wanted[0][0] if wanted else LONGEST
        column = -(-begin // S)

        def at(page: int, column=column, private=private, stop=stop, begin=begin) -> int:
            return page + private * (page >= column and stop > begin)

        for page in range(start // S, (stop - 1) // S + 1):
            row[at(page)] = ("page", page)
        for phase in range(max([0, *segments.phase.tolist()]) + 1):
            for event in (each for each in events if each.phase == phase):
                position, pages, kept = wanted[event.era]
                assert start <= position < stop
                before = wanted[event.era - 1] if event.era else (0, 0, 0)
                read = [row[column + n] for n in range(event.private)]
                assert read == [("kept", event.era - 1, n) for n in range(before[2])]
                read = [row[at(page)] for page in event.pages]
                end = -(-position // S) if not event.era else pages
                assert read == [("page", page) for page in range(before[1], end)]
                assert event.kept == kept
                assert event.tokens == (
                    position if not event.era else (before[2] + pages - before[1]) * S
                )
                for n in range(kept):
                    row[column + n] = ("kept", event.era, n)
            for n in np.flatnonzero(segments.phase == phase).tolist():
                for i in range(int(segments.start[n]), int(segments.stop[n])):
                    passed = [m for m, (position, *_) in enumerate(wanted) if position <= i]
                    era = passed[-1] if passed else -1
                    _, pages, kept = wanted[era] if passed else (0, 0, 0)
                    seen = [row[each] for each in shifted(segments, n, i, at)]
                    assert seen == [
                        *(("kept", era, n) for n in range(kept)),
                        *(("page", page) for page in range(pages, i // S + 1)),
                    ]
        assert [event.era for event in events] == [
            m for m, (position, *_) in enumerate(wanted) if start <= position < stop
        ]
        gone = {n for a, b in schedule.course(prompt).freed(stop) for n in range(a, b)}
        for each in gone:
            row.pop(each, None)  # a later read of it is a KeyError


def shifted(segments, n, i, at):
    """The columns that a query sees; pages of a segment before the first event stand where the
    step's last query has them."""
    if segments.packed[n] < 0:
        return [at(page) for page in range(int(segments.first[n]), i // segments.page_size + 1)]
    kept, first, packed = (int(x[n]) for x in (segments.kept, segments.first, segments.packed))
    pages = range(first, i // segments.page_size + 1)
    return [*range(packed, packed + kept), *map(at, pages)]


@claims
@given(scheduled(), sizes, st.integers(1, LONGEST - 1), st.sets(st.integers(1, LONGEST - 1)))
def test_every_query_reads_what_it_would_had_the_request_come_token_by_token(
    settings, S, prompt, cuts
):
    play(settings, S, prompt, sorted(cuts))


@claims
@given(
    st.integers(2, 5), st.floats(0.05, 0.95), sizes, st.sets(st.integers(1, LONGEST - 1)),
    st.booleans(),
)  # fmt: skip
def test_chunks_that_are_packed_where_they_lie_are_read_as_they_were_left(
    C, share, S, cuts, shortcut
):
    """A query sees, of each chunk before its own, what was kept, and all pages of its own."""
    k = math.ceil(share * C)
    line = f"knorm(budget={share!r}, chunk={C * S}, sinks=0)"
    if k == C:
        with pytest.raises(ValueError, match=r"all of its \d pages .* write a larger chunk"):
            Planner(Settings(policy=parse(line)), S)
        return
    planner = Planner(Settings(policy=parse(line), shortcut=shortcut), S)
    row: dict[int, object] = {}
    for start, stop in itertools.pairwise([0, *sorted(cuts), LONGEST]):
        step = tuple(np.array([n]) for n in (start, stop, 7))
        segments, events = planner.plan(*step), planner.schedule.events(*step)
        for page in range(start // S, (stop - 1) // S + 1):
            row[page] = ("page", page)
        last = max([0, *segments.phase.tolist(), *(event.phase for event in events)])
        for phase in range(last + 1):
            for event in (each for each in events if each.phase == phase):
                m = event.era
                assert start < (m + 1) * C * S <= stop
                assert event.in_place
                assert [row[p] for p in event.pages] == [("page", m * C + n) for n in range(C)]
                assert (event.tokens, event.kept, event.stay) == (C * S, k, k * S)
                for n in range(k):
                    row[event.into + n] = ("kept", m, n)
            for n in np.flatnonzero(segments.phase == phase).tolist():
                for i in range(int(segments.start[n]), int(segments.stop[n])):
                    own = i // (C * S)
                    kept = planner.held_pages(int(segments.kept[n])).tolist()
                    pages = [*kept, *range(int(segments.first[n]), i // S + 1)]
                    assert [row[page] for page in pages] == [
                        *(("kept", m, j) for m in range(own) for j in range(k)),
                        *(("page", page) for page in range(own * C, i // S + 1)),
                    ]
        assert len(events) == stop // (C * S) - start // (C * S)
        for first, end in planner.evictable(stop):
            for page in range(first, end):
                row.pop(page, None)
        assert sorted(row) == sorted({*planner.needed(stop).tolist(), *range(stop // S // C * C,
            (stop - 1) // S + 1)})  # fmt: skip
        assert len(row) <= planner.most_pages(stop - start, LONGEST)


def test_protected_tokens_of_a_chunk_stay_with_it():
    settings = Settings(
        policy=parse("knorm(budget=0.5, chunk=64)"), protect=((70, 75), (120, 140))
    )
    schedule = Planner(settings, 16).schedule
    events = schedule.events(np.array([0]), np.array([192]), np.array([50]))
    assert [list(event.protect) for event in events] == [
        [(70, 75), (120, 140)],
        [(6, 11), (56, 64)],
        [(0, 12)],
    ]
    assert [schedule.scorer(event).sinks for event in events] == [4, 0, 0]


@claims
@given(
    scheduled(), sizes, st.integers(1, LONGEST - 1), st.integers(1, 90), st.integers(1, LONGEST)
)
def test_most_pages_is_the_most_that_some_position_holds(settings, S, prompt, in_flight, tokens):
    schedule = Planner(settings, S).schedule
    wanted, most = eras(settings, S, prompt), 0
    private = -(-settings.policy.scored.budget // S)
    for processed in range(tokens):
        total = min(processed + in_flight, tokens)
        inserted = private * bool(wanted and wanted[0][0] < total)
        gone = sum(b - a for a, b in schedule.course(prompt).freed(processed))
        most = max(most, -(-total // S) + inserted - gone)
    assert schedule.most_pages(prompt, in_flight, tokens) == most


def test_an_answer_of_any_length_holds_a_bounded_number_of_pages():
    """4 private pages beside those of the prompt, or beside 6 and the one that begins."""
    schedule = Planner(Settings(policy=parse("knorm(budget=64, interval=32)")), 16).schedule
    assert schedule.most_pages(100, 1, 10_000) == schedule.most_pages(100, 1, 1_000) == 7 + 4
    assert schedule.most_pages(20, 1, 10_000) == schedule.most_pages(20, 1, 1_000) == 6 + 4 + 1
    assert [sum(b - a for a, b in schedule.course(20).freed(n)) for n in (96, 97, 129)] == [
        0,
        6,
        8,
    ]


def test_a_prompt_that_streams_in_holds_a_bounded_number_of_pages():
    """4 private pages beside 6 and those in flight, whatever the prompt; and what every query
    sees follows from its position alone."""
    schedule = Planner(Settings(policy=parse("knorm(budget=64, chunk=32)")), 16).schedule
    for prompt in (1, 96, 97, 500, 9_999):
        assert schedule.course(prompt) == schedule.course(100_000)
        assert schedule.most_pages(prompt, 1, 10_000) == 6 + 4 + 1
        assert schedule.most_pages(prompt, 100, 10_000) == 6 + 4 + 7
    assert schedule.most_pages(50, 100, 90) == 6, "it never comes so far"


@pytest.mark.parametrize("line", ["snapkv(budget=64, window=32, interval=48)", "knorm(budget=64)"])
def test_the_windows_queries_of_an_event_are_those_before_it(line):
    planner = BatchPlanner(16)
    planner.know([Settings(policy=parse(line))])
    seen: dict[int, dict[int, int]] = {}
    for start, stop in itertools.pairwise([0, 90, 100, 101, 130, 200, 300]):
        batch = tuple(np.array([0, n]) for n in (0, start, stop, 100))
        choice, computed, total, prompt = batch
        for each in planner.observed(choice, computed, total, prompt):
            assert each.row == 1
            for n, flat in enumerate(range(each.tokens.start, each.tokens.stop)):
                seen.setdefault(each.era, {})[each.offset + n] = start + flat
    if "knorm" in line:
        assert not seen
        return
    ends = [100, 144, 192, 240, 288]
    for era, end in enumerate(ends):
        assert seen[era] == {n: end - 32 + n for n in range(32)}
    assert max(seen) <= len(ends)


def test_what_is_never_to_go_stays_through_every_event():
    """Protected tokens of the prompt, of the answer, and sinks, through five packings by norm."""
    torch.manual_seed(0)
    S, prompt, D = 4, 30, 8
    settings = Settings(
        policy=parse("knorm(budget=24, sinks=2, interval=8)"),
        protect=((9, 12), (26, 29), (37, 39)),
    )
    schedule = Planner(settings, S).schedule
    keys = torch.randn(1, 90, 2, D)
    keys[0, :, :, 0] = torch.arange(90)[:, None]  # tells which token a key is
    kept = None
    events = schedule.events(np.array([0]), np.array([90]), np.array([prompt]))
    assert len(events) > 5
    for event in events:
        pages = torch.arange(event.pages.start * S, event.pages.stop * S)
        rows = pages.expand(2, -1) if kept is None else torch.cat([kept, pages.expand(2, -1)], 1)
        source = torch.stack([keys[0, rows[h].clamp(max=89), h] for h in range(2)], 1)[None]
        given = PromptKV(
            keys=source, values=source, queries=None, lengths=torch.tensor([event.tokens]),
            scale=1.0, page_size=S, event=event.era,
        )  # fmt: skip
        keep = torch.tensor([event.kept * S])
        chosen = keep_tokens(settings.policy.scored, given, keep, event.kept * S, event.protect)
        kept = rows.gather(1, chosen[0])
        end = event.tokens if not event.era else event.pages.stop * S
        always = [0, 1, *(t for a, b in settings.protect for t in range(a, b) if t < end // S * S)]
        for head in kept.tolist():
            assert set(always) <= set(head)
            assert head[: len(always)] == always, "first, in order"
            assert len(set(head)) == len(head)


@pytest.mark.parametrize(
    "line, message",
    [
        ("knorm(interval=0)", "interval must be a number of tokens, at least 1, or None"),
        ("knorm(interval=True)", "interval must be a number of tokens"),
        ("knorm(interval=1.5)", "interval must be a number of tokens"),
        ("snapkv(interval=32)", "interval must be at least window = 64 tokens"),
        ("pyramid(snapkv(interval=64))", "leave interval and chunk out"),
        ("pyramid(keydiff(chunk=64))", "leave interval and chunk out"),
        ("knorm(chunk=0)", "chunk must be a number of tokens, at least 1, or None"),
        ("knorm(chunk=64, interval=64)", "packs answers too, as they come; leave interval out"),
        ("snapkv(chunk=64)", "leave chunk out, or use keydiff"),
        ("knorm(budget=0.25)", "write knorm(budget=0.25, chunk=512) or knorm(budget=1024)"),
        ("knorm(budget=1.5, chunk=64)", "a share of each chunk, above 0 and below 1"),
        ("knorm(budget=0.0, chunk=64)", "a share of each chunk, above 0 and below 1"),
        ("snapkv(budget=0.25)", "write snapkv(budget=1024)"),
        ("knorm(budget=0.25, chunk=8)", "at least sinks + window = 4 tokens, got 2"),
        ("tova(chunk=64)", "whose queries tova scores by; leave chunk out"),
    ],
)
def test_intervals_and_chunks_that_cannot_be(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(line)


def test_an_interval_is_part_of_the_line():
    assert "interval=96" in str(parse("snapkv(budget=512, interval=96)"))
    assert "interval" not in str(parse("snapkv(budget=512)"))


def test_lots_of_an_events_tokens_are_drawn_anew():
    random = parse("random(budget=8)").scored
    keys = torch.zeros(1, 64, 2, 4)

    def lots(event):
        prompt = PromptKV(
            keys=keys, values=keys, queries=None, lengths=torch.tensor([64]), scale=1.0,
            page_size=4, event=event,
        )  # fmt: skip
        return random.score(prompt)

    assert not (lots(0) == lots(1)).all()
    assert not (lots(1) == lots(2)).all()
    assert (lots(2) == lots(2)).all()


def test_columns_of_a_schedule_without_an_interval_are_those_of_the_plan():
    planner = Planner(Settings(policy=parse("knorm(budget=64)")), 16)
    segments = planner.plan(np.array([130]), np.array([131]), np.array([100]))
    assert columns(segments, 0, 130) == [7, 8, 9, 10, 6, 11, 12]
    assert (segments.kept[0], segments.phase[0]) == (4, 0)
