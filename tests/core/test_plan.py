"""The planner against its definition, spelled out one query and one page at a time.

query i sees page p  iff  p <= i // S, and
                          i < min_context, or
                          p holds a token that is kept from the start or protected, or
                          p >= first_token(i) // S
"""

import itertools
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplug import BatchPlanner, Choices, Composition, Planner, Settings, parse, read_settings
from kvplug.policies.quest import Quest

LONGEST = 420
claims = hypothesis_settings(max_examples=200, deadline=None)


def sees(settings: Settings, S: int, i: int, p: int) -> bool:
    """The definition."""
    eviction = settings.policy.eviction
    if p > i // S:
        return False
    if eviction is None or i < settings.min_context:
        return True
    spans = [(0, eviction.kept_from_start()), *settings.protect]
    if any(a < b and a < (p + 1) * S and p * S < b for a, b in spans):
        return True
    return p >= int(eviction.first_token(np.array([i]))[0]) // S


def seen_pages(settings: Settings, S: int, i: int) -> list[int]:
    return [p for p in range(i // S + 1) if sees(settings, S, i, p)]


def per_query(planner, segments):
    """Flat token -> (row, position, pages, selects, decodes), as the segments say it."""
    queries = []
    for n in range(len(segments.row)):
        kept, first = segments.kept[n], segments.first[n]
        assert segments.start[n] < segments.stop[n]
        assert segments.token[n] == len(queries), "segments follow each other in the batch"
        for i in range(segments.start[n], segments.stop[n]):
            pages = [*planner.held[:kept].tolist(), *range(first, i // planner.page_size + 1)]
            where = (int(segments.row[n]), i)
            queries.append((*where, pages, bool(segments.selects[n]), bool(segments.decodes[n])))
    return queries


budgets = st.integers(1, 300) | st.sampled_from([0.0625, 0.3, 1.0])


@st.composite
def settings_(draw, policies=("streaming", "quest", "both")):
    kind = draw(st.sampled_from(policies))
    sinks = draw(st.sampled_from([0, 1, 4, 16, 33]) | st.integers(0, 150))
    window = draw(st.sampled_from([1, 16, 64]) | st.integers(1, 200))
    terms = {
        "streaming": f"streaming_llm(sinks={sinks}, window={window})",
        "quest": f"{draw(st.sampled_from(['quest', 'twilight']))}(budget={draw(budgets)})",
    }
    span = st.tuples(st.integers(0, LONGEST), st.integers(1, 70)).map(lambda s: (s[0], sum(s)))
    return Settings(
        policy=parse(" + ".join(terms.values()) if kind == "both" else terms[kind]),
        min_context=draw(st.just(0) | st.integers(0, 250)),
        protect=tuple(sorted(draw(st.lists(span, max_size=3)))),
        shortcut=draw(st.booleans()),
    )


def most_units(settings: Settings, S: int, visible: int) -> int:
    """The definition: what a selecting query reads of so many tokens."""
    selector = settings.policy.selector
    unit, least = (1, S + 4) if selector.name == "twilight" else (S, 3)
    tokens = selector.budget
    if isinstance(tokens, float):
        tokens = math.ceil(tokens * visible)
    return min(max(math.ceil(tokens / unit), least), math.ceil(visible / unit))


def tokens_in(pages: list[int], S: int, i: int) -> int:
    return (len(pages) - 1) * S + i % S + 1


def selects_of(settings: Settings, S: int, visible: int, i: int) -> bool:
    """Whether the shortcut leaves a query that decodes to the selection."""
    selector = settings.policy.selector
    if selector is None or i < settings.min_context:
        return False
    unit = 1 if selector.name == "twilight" else S
    return math.ceil(visible / unit) > most_units(settings, S, visible)


sizes = st.sampled_from([16, 32, 64])
request = st.tuples(  # computed, queries, prompt
    st.integers(0, 250), st.just(0) | st.just(1) | st.integers(0, 150), st.integers(1, LONGEST)
)


def batch(requests):
    """computed, total and prompt, [B] each."""
    computed, queries, prompt = (np.array(x, np.int64) for x in zip(*requests, strict=True))
    return computed, computed + queries, prompt


@claims
@given(settings_(), sizes, st.lists(request, min_size=1, max_size=4))
def test_every_query_sees_what_the_definition_says(settings, S, requests):
    planner = Planner(settings, S)
    computed, total, prompt = batch(requests)
    segments = planner.plan(computed, total, prompt)
    queries = per_query(planner, segments)

    wanted = [(b, i) for b in range(len(total)) for i in range(computed[b], total[b])]
    assert [query[:2] for query in queries] == wanted, "each query once, in the batch's order"
    for b, i, pages, selects, decodes in queries:
        assert pages == seen_pages(settings, S, i)
        assert decodes == (i >= prompt[b])
        selector = settings.policy.selector
        if not settings.shortcut:
            assert selects == (selector is not None and decodes)
        else:
            assert selects == (decodes and selects_of(settings, S, tokens_in(pages, S, i), i))

    hidden = any(len(pages) < i // S + 1 for _, i, pages, _, _ in queries)
    assert segments.untouched == (not hidden and not any(q[3] for q in queries))
    assert (segments.queries[segments.selects] == 1).all()


@claims
@given(settings_(), sizes, st.lists(request, min_size=1, max_size=3))
def test_visible_counts_the_tokens_of_the_last_query(settings, S, requests):
    planner = Planner(settings, S)
    segments = planner.plan(*batch(requests))
    for n in range(len(segments.row)):
        last = int(segments.stop[n]) - 1
        pages = seen_pages(settings, S, last)
        assert segments.visible[n] == sum(t // S in pages for t in range(last + 1))
        assert segments.pages[n] == len(pages)
        # Causal within the segment: an earlier query sees the same pages up to its own.
        for i in range(segments.start[n], last):
            assert seen_pages(settings, S, i) == [p for p in pages if p <= i // S]


@claims
@given(
    settings_(),
    sizes,
    st.integers(1, LONGEST),
    st.integers(1, LONGEST),
    st.sets(st.integers(1, LONGEST - 1)),
    st.sets(st.integers(1, LONGEST - 1)),
)
def test_chunks_never_change_what_a_query_sees(settings, S, total, prompt, cuts, other_cuts):
    planner = Planner(settings, S)

    def in_chunks(cuts):
        bounds = [0, *sorted(cut for cut in cuts if cut < total), total]
        queries = []
        for start, stop in itertools.pairwise(bounds):
            # As the second row of a batch, behind a request that is done with its prefill.
            segments = planner.plan(*batch([(30, 1, 30), (start, stop - start, prompt)]))
            queries += [query[1:] for query in per_query(planner, segments)[1:]]
        return queries

    assert in_chunks(cuts) == in_chunks(other_cuts)


@pytest.mark.parametrize("requests", [[], [(0, 0, 1)], [(7, 0, 3), (0, 0, 1), (64, 0, 64)]])
@pytest.mark.parametrize("shortcut", [True, False])
def test_a_batch_of_nothing_has_no_segments(requests, shortcut):
    policy = parse("streaming_llm(sinks=1, window=1) + quest(budget=1)")
    planner = Planner(Settings(policy=policy, shortcut=shortcut), 16)
    columns = np.array(requests, np.int64).reshape(-1, 3).T
    segments = planner.plan(columns[0], columns[0] + columns[1], columns[2])
    assert len(segments.row) == 0
    assert segments.untouched


def test_dense_sees_everything_in_one_segment_a_phase():
    planner = Planner(Settings(), 16)
    segments = planner.plan(*batch([(0, 100, 60), (5, 0, 5), (99, 1, 1)]))
    assert segments.untouched
    assert segments.start.tolist() == [0, 60, 99]
    assert segments.stop.tolist() == [60, 100, 100]
    assert segments.decodes.tolist() == [False, True, True]


def test_a_resumed_request_selects_behind_its_original_prompt():
    """After a preemption, prompt and output come as one prefill; decoding selected before it."""
    planner = Planner(Settings(policy=parse("quest(budget=48)")), 16)
    segments = planner.plan(*batch([(0, 100, 70)]))
    assert segments.start.tolist() == [0, *range(70, 100)]
    assert segments.selects.tolist() == [False] + [True] * 30


def test_where_keeps_the_segments_of_a_mask():
    planner = Planner(Settings(policy=parse("quest(budget=48)")), 16)
    segments = planner.plan(*batch([(0, 100, 97)]))
    rest, selected = segments.where(~segments.selects), segments.where(segments.selects)
    assert (rest.start.tolist(), rest.stop.tolist()) == ([0], [97])
    assert selected.token.tolist() == selected.start.tolist() == [97, 98, 99]
    assert selected.page_size == 16


# What a request holds. Everything below asks about one request, whose queries come in order.

evicting = settings_(policies=("streaming", "both"))


@claims
@given(settings_(), sizes, st.integers(0, LONGEST))
def test_evictable_pages_are_those_that_no_later_query_sees(settings, S, processed):
    planner = Planner(settings, S)
    ranges = planner.evictable(processed)
    pages = [page for first, last in ranges for page in range(first, last)]
    assert all(first < last for first, last in ranges)
    assert pages == sorted(set(pages))
    later = range(processed, processed + 3 * S + 250)
    unseen = [p for p in range(processed // S) if not any(sees(settings, S, i, p) for i in later)]
    assert pages == unseen


@claims
@given(settings_(), sizes, st.integers(0, LONGEST))
def test_needed_pages_are_those_that_a_later_query_sees(settings, S, tokens):
    later = range(tokens, tokens + 3 * S + 250)
    seen = [p for p in range(tokens // S) if any(sees(settings, S, i, p) for i in later)]
    assert Planner(settings, S).needed(tokens).tolist() == seen


@claims
@given(settings_(), sizes, st.integers(0, LONGEST // 16), st.integers(0, LONGEST // 16))
def test_a_page_that_a_prefix_needs_is_needed_by_every_longer_one_that_reaches_it_later(
    settings, S, shorter, longer
):
    """What lets a lookup go from a missing page straight to the prefix that ends before it."""
    planner = Planner(settings, S)
    shorter, longer = sorted((shorter, longer))
    for page in planner.needed(longer * S).tolist():
        if page < shorter:
            assert page in planner.needed(shorter * S)


@claims
@given(
    evicting,
    sizes,
    st.integers(1, 100),
    st.integers(1, LONGEST),
)
def test_most_pages_is_the_most_that_some_position_holds(settings, S, in_flight, max_tokens):
    planner = Planner(settings, S)
    most = 0
    for processed in range(max_tokens):
        written = -(-min(processed + in_flight, max_tokens) // S)
        gone = {p for first, last in planner.evictable(processed) for p in range(first, last)}
        most = max(most, len(set(range(written)) - gone))
    assert planner.most_pages(in_flight, max_tokens) == most


@pytest.mark.parametrize("tokens, private, read", [(199, 0, 13), (200, 0, 13), (201, 4, 5)])
def test_a_request_of_exactly_min_context_tokens_is_served_dense(tokens, private, read):
    """Also where its last query goes through the selection, as all do under CUDA graphs."""
    length = np.array([tokens])
    for shortcut in (True, False):
        selecting = Settings(policy=parse("quest(budget=80)"), min_context=200, shortcut=shortcut)
        planner = Planner(selecting, 16)
        segments = planner.plan(length - 1, length, np.array([10]))
        assert segments.selects.tolist() == [not shortcut or tokens > 200]
        assert planner.selection(segments).tolist() == [read]
    scored = Planner(Settings(policy=parse("knorm(budget=64)"), min_context=200), 16)
    assert scored.schedule.private_pages(length).tolist() == [private]


@claims
@given(settings_(), sizes, st.integers(1, LONGEST))
def test_width_holds_the_widest_selection_and_all_of_a_request_under_min_context(
    settings, S, max_tokens
):
    planner = Planner(settings, S)
    width = planner.width(max_tokens)
    for i in range(max_tokens):
        visible = tokens_in(seen_pages(settings, S, i), S, i)
        read = -(-visible // planner.unit)
        if settings.policy.selector is not None and i >= settings.min_context:
            read = most_units(settings, S, visible)
        assert read <= width
    assert width <= -(-max_tokens // planner.unit)


@given(st.integers(1, 10_000), sizes)
def test_a_budget_is_rounded_up_to_whole_pages_and_at_least_three(budget, S):
    planner = Planner(Settings(policy=parse(f"quest(budget={budget})")), S)
    keep = int(planner.reads(np.array([100_000]))[0])
    assert keep * S >= budget
    assert keep == 3 or (keep - 1) * S < budget


# A prompt that is compressed once it is complete: private pages stand for its whole ones.

scored_request = st.tuples(  # computed, queries, prompt; often around the prompt's end
    st.integers(0, 250) | st.integers(-40, 40),
    st.just(0) | st.just(1) | st.integers(0, 150),
    st.integers(1, LONGEST) | st.integers(1, LONGEST // 16).map(lambda n: n * 16),
).map(lambda r: (max(r[0] if r[0] > 40 else r[2] + r[0], 0), *r[1:]))


@st.composite
def scored_settings(draw, selectors=("", " + quest(budget=64)", " + quest(budget=200)")):
    policies = ["snapkv(budget={}, window=16)", "knorm(budget={})", "random(budget={})"]
    policy = draw(st.sampled_from(policies)).format(draw(st.sampled_from([20, 64, 100, 200])))
    return Settings(
        policy=parse(policy + draw(st.sampled_from(selectors))),
        min_context=draw(st.just(0) | st.integers(0, 250)),
        shortcut=draw(st.booleans()),
    )


def packs(settings: Settings, S: int, prompt: int) -> int:
    """The definition: the pages that hold what the prompt keeps, 0 where it stays whole."""
    whole, budget = prompt // S, -(-settings.policy.scored.budget // S)
    if not settings.shortcut:
        return min(whole, budget)
    return budget if whole > budget and prompt > settings.min_context else 0


def packed_rows(planner, computed, total, prompt) -> list[int]:
    return [event.row for event in planner.schedule.events(computed, total, prompt)]


def columns(segments, n: int, i: int) -> list[int]:
    """Columns of the request's table that query ``i`` of segment ``n`` sees, as it says."""
    kept, first, packed = (int(x[n]) for x in (segments.kept, segments.first, segments.packed))
    pages = range(first, i // segments.page_size + 1)
    if packed < 0:
        assert kept == first == 0
        return list(pages)
    private = range(packed, packed + kept)
    return [*private, *(page + kept if page >= packed else page for page in pages)]


def seen_columns(settings: Settings, S: int, prompt: int, i: int) -> list[int]:
    """The definition: a row is the prompt's pages, the private ones, and those behind."""
    private, ends = packs(settings, S, prompt), -(-prompt // S)
    if i < prompt or not private:
        return list(range(i // S + 1))
    partial = [prompt // S] if prompt % S else []
    behind = range(ends + private, i // S + 1 + private)
    return [*range(ends, ends + private), *partial, *behind]


@claims
@given(scored_settings(), sizes, st.lists(scored_request, min_size=1, max_size=4))
def test_before_a_prompts_end_all_is_seen_and_behind_it_what_it_keeps(settings, S, requests):
    planner = Planner(settings, S)
    computed, total, prompt = batch(requests)
    segments = planner.plan(computed, total, prompt)
    queries = []
    for n in range(len(segments.row)):
        row = int(segments.row[n])
        P, private = int(prompt[row]), packs(settings, S, int(prompt[row]))
        assert segments.token[n] == len(queries)
        for i in range(segments.start[n], segments.stop[n]):
            queries.append((row, i))
            assert columns(segments, n, i) == seen_columns(settings, S, P, i)
            assert segments.decodes[n] == (i >= P)
        last = int(segments.stop[n]) - 1
        packed = private > 0 and last >= P
        visible = private * S + (last + 1 - P // S * S) if packed else last + 1
        assert segments.visible[n] == visible
        pages = len(seen_columns(settings, S, P, last))
        assert segments.pages[n] == pages
        if not settings.policy.selector or last < P:
            assert not segments.selects[n]
        elif settings.shortcut:
            assert segments.selects[n] == selects_of(settings, S, visible, last)
        else:
            assert segments.selects[n]
    assert queries == [(b, i) for b in range(len(total)) for i in range(computed[b], total[b])]
    assert (segments.queries[segments.selects] == 1).all()
    touched = any(i >= prompt[b] and packs(settings, S, int(prompt[b])) for b, i in queries)
    assert segments.untouched == (not touched and not segments.selects.any())


@claims
@given(
    scored_settings(),
    sizes,
    st.integers(1, LONGEST),
    st.integers(1, LONGEST),
    st.sets(st.integers(1, LONGEST - 1)),
    st.booleans(),
)
def test_no_chunk_changes_what_is_kept_not_even_one_that_goes_past_the_prompts_end(
    settings, S, total, prompt, cuts, at_the_end
):
    planner = Planner(settings, S)
    cuts = sorted({cut for cut in cuts | ({prompt} if at_the_end else set()) if cut < total})
    seen, compressed = [], []
    for start, stop in itertools.pairwise([0, *cuts, total]):
        step = batch([(30, 1, 30), (start, stop - start, prompt)])
        segments = planner.plan(*step)
        for n in np.flatnonzero(segments.row == 1):
            for i in range(segments.start[n], segments.stop[n]):
                seen.append((columns(segments, n, i), bool(segments.selects[n])))
        if 1 in packed_rows(planner, *step):
            compressed.append((start, stop))
    whole = planner.plan(*batch([(0, total, prompt)]))
    at_once = [
        (columns(whole, n, i), bool(whole.selects[n]))
        for n in range(len(whole.row))
        for i in range(whole.start[n], whole.stop[n])
    ]
    assert seen == at_once
    passed = bool(packs(settings, S, prompt)) and total > prompt
    assert len(compressed) == passed, "once, in the step of the first query behind the prompt"
    assert all(start <= prompt < stop for start, stop in compressed)


@claims
@given(scored_settings(), sizes, st.lists(scored_request, min_size=1, max_size=6))
def test_a_step_compresses_the_long_prompts_whose_end_it_passes(settings, S, requests):
    planner = Planner(settings, S)
    computed, total, prompt = batch(requests)
    wanted = [
        b
        for b in range(len(total))
        if int(prompt[b]) in range(computed[b], total[b]) and packs(settings, S, int(prompt[b]))
    ]
    assert packed_rows(planner, computed, total, prompt) == wanted
    private = [packs(settings, S, int(length)) for length in prompt]
    assert planner.schedule.private_pages(prompt).tolist() == private


@pytest.mark.parametrize("policy", ["snapkv(budget=64)", "snapkv(budget=50, window=9)"])
def test_a_prompt_is_packed_from_the_first_page_beyond_its_budget_on(policy):
    lengths = np.array([1, 15, 16, 31, 63, 64, 79, 80, 81, 96, 1000])
    private = Planner(Settings(policy=parse(policy)), 16).schedule.private_pages
    assert private(lengths).tolist() == [0] * 7 + [4] * 4
    private = Planner(Settings(policy=parse(policy), min_context=96), 16).schedule.private_pages
    assert private(lengths).tolist() == [0] * 10 + [4]
    private = Planner(Settings(policy=parse(policy), shortcut=False), 16).schedule.private_pages
    assert private(lengths).tolist() == [0, 0, 1, 1, 3, 4, 4, 4, 4, 4, 4], "all that has a page"


@pytest.mark.parametrize("policy", ["dense", "quest(budget=64)", "streaming_llm(window=16)"])
def test_other_policies_never_compress(policy):
    planner = Planner(Settings(policy=parse(policy), shortcut=False), 16)
    step = batch([(90, 20, 100), (0, 300, 160)])
    assert packed_rows(planner, *step) == []
    assert planner.schedule.private_pages(step[2]).tolist() == [0, 0]
    assert (planner.plan(*step).packed == -1).all()


def test_a_step_past_a_prompts_end_spelled_out():
    """100 tokens are 6 whole pages and 4 tokens; 4 private pages follow from column 7 on."""
    planner = Planner(Settings(policy=parse("knorm(budget=64)")), 16)
    segments = planner.plan(*batch([(60, 60, 100), (100, 1, 100), (130, 1, 100), (9, 1, 9)]))
    assert segments.row.tolist() == [0, 0, 1, 2, 3]
    assert segments.start.tolist() == [60, 100, 100, 130, 9]
    assert segments.stop.tolist() == [100, 120, 101, 131, 10]
    assert segments.packed.tolist() == [-1, 7, 7, 7, -1]
    assert segments.kept.tolist() == [0, 4, 4, 4, 0]
    assert segments.first.tolist() == [0, 6, 6, 6, 0]
    assert segments.visible.tolist() == [100, 88, 69, 99, 10]
    assert columns(segments, 3, 130) == [7, 8, 9, 10, 6, 11, 12]


def test_selection_behind_a_packed_prompt_counts_the_pages_that_are_left():
    """Four private pages and the answer: the fifth page of them all is one more than it reads."""
    planner = Planner(Settings(policy=parse("knorm(budget=64) + quest(budget=64)")), 16)
    segments = planner.plan(*batch([(0, 90, 80), (96, 1, 96), (112, 1, 96)]))
    assert segments.start[segments.selects].tolist() == [*range(80, 90), 96, 112]
    planner = Planner(Settings(policy=parse("knorm(budget=64) + quest(budget=80)")), 16)
    segments = planner.plan(*batch([(0, 90, 80), (96, 1, 96), (112, 1, 96)]))
    assert segments.start[segments.selects].tolist() == [112]


LINES = ["dense", "quest(budget=32)", "snapkv(budget=64)", "knorm(budget=32) + quest(budget=32)"]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 200), st.integers(1, 40), st.integers(1, 220)),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_a_mixed_batch_is_planned_as_each_request_alone(requests, shortcut):
    settings = [read_settings({"policy": line, "shortcut": shortcut}, {}) for line in LINES]
    planner = BatchPlanner(16)
    planner.know(settings)
    choice, computed, new, prompt = (np.array(each) for each in zip(*requests, strict=True))
    total = computed + new
    segments = planner.plan(choice, computed, total, prompt)
    assert (np.diff(segments.token) > 0).all()
    assert int(segments.queries.sum()) == int(new.sum())
    packed = planner.events(choice, computed, total, prompt)
    offset = np.cumsum(new) - new
    for row, one in enumerate(choice.tolist()):
        alone = Planner(settings[one], 16)
        only = (computed[[row]], total[[row]], prompt[[row]])
        mine, its = segments.where(segments.row == row), alone.plan(*only)
        assert set(mine.choice.tolist()) == {one}
        assert (mine.token - offset[row] == its.token).all()
        for name in ("start", "stop", "kept", "first", "packed", "phase", "selects"):
            assert (getattr(mine, name) == getattr(its, name)).all(), name
        packs = [replace(event, row=0) for event in packed if event.row == row]
        assert packs == alone.schedule.events(*only)


@claims
@given(
    st.lists(scored_settings(), min_size=1, max_size=3),
    sizes,
    st.lists(st.tuples(scored_request, st.integers(0, 2)), min_size=1, max_size=6),
)
def test_a_step_keeps_the_window_queries_that_scores_will_ask_for(several, S, requests):
    planner = BatchPlanner(S)
    planner.know(several)
    computed, total, prompt = batch([one for one, _ in requests])
    choice = np.array([number % len(several) for _, number in requests])
    wanted, token = {}, 0
    for b, number in enumerate(choice.tolist()):
        settings, end = several[number], int(prompt[b])
        scored = settings.policy.scored
        for i in range(computed[b], total[b]):
            window = scored.window if scored.needs_queries and packs(settings, S, end) else 0
            if end - window <= i < end:
                wanted[b, i - end + window] = token
            token += 1
    seen = planner.observed(choice, computed, total, prompt)
    found = {
        (each.row, each.offset + n): row
        for each in seen
        for n, row in enumerate(range(each.tokens.start, each.tokens.stop))
    }
    assert found == wanted
    assert all(each.window == several[choice[each.row]].policy.scored.window for each in seen)


@claims
@given(st.one_of(settings_(), scored_settings()), sizes, st.lists(scored_request, max_size=5))
def test_a_decode_batch_in_one_shape_sees_what_its_segments_say(settings, S, requests):
    planner = Planner(settings, S)
    _, total, prompt = batch([*requests, (40, 1, 30)])
    segments = planner.plan(total - 1, total, np.minimum(prompt, total - 1))
    rows = len(total) + 2
    fixed = segments.one_per_row(rows, selects=True)
    assert fixed.row.tolist() == fixed.token.tolist() == list(range(rows))
    assert fixed.where(np.arange(rows) < len(total)).visible.tolist() == segments.visible.tolist()
    assert fixed.visible[len(total) :].tolist() == [0, 0], "rows of no request read nothing"
    if settings.policy.selector is not None:
        keep = planner.selection(fixed)
        short = fixed.stop <= settings.min_context
        whole = -(-fixed.visible // planner.unit)
        assert (keep[short] == whole[short]).all(), "all of a short request"
        wanted = [most_units(settings, S, seen) for seen in fixed.visible[~short].tolist()]
        assert keep[~short].tolist() == wanted
        assert keep.max() <= planner.width(int(total.max()))


def test_pages_that_a_step_decodes_on_in_are_named_with_what_they_hold_then():
    """Of 4 tokens: a prompt's last chunk and a page that begins anew are none."""
    computed = np.array([3, 8, 9, 9, 7, 6, 5])
    total = np.array([5, 9, 10, 14, 8, 6, 7])
    prompt = np.array([4, 2, 9, 3, 7, 2, 6])
    row, first, held = BatchPlanner(4).begun(computed, total, prompt, 4)
    assert row.tolist() == [2, 3, 4]
    assert first.tolist() == [3, 4, 9]
    assert held.tolist() == [2, 4, 4]


def test_equal_settings_have_one_number():
    own = Settings(policy=parse("quest(budget=64)"))
    choices = Choices(own)
    other = Settings(policy=parse("snapkv(budget=64)"))
    asked = (other, own, Settings(policy=own.policy), other)
    assert [choices.number(each, held=[]) for each in asked] == [1, 0, 0, 1]
    assert choices.settings == [own, other]


def test_however_many_settings_clients_send_few_are_remembered_and_none_is_mistaken():
    own, server = Settings(policy=parse("quest(budget=64)")), BatchPlanner(16)
    choices, source = Choices(own), random.Random(0)
    batch: list[tuple[Settings, int]] = [(own, 0)] * 80
    for protected in range(1, 2000):
        one = Settings(policy=own.policy, protect=((0, protected),))
        row = source.randrange(80 if protected > 1000 else 40)
        batch[row] = one, choices.number(one, [number for _, number in batch])
        server.know(choices.settings)
        assert all(choices.settings[number] == wanted for wanted, number in batch)
        assert all(
            server.planners[number].settings is choices.settings[number] for _, number in batch
        )
        assert len(server.planners) == len(choices.settings) <= (64 if protected <= 1000 else 82)
    again = batch[0][0]
    assert choices.number(again, [number for _, number in batch]) == batch[0][1]


def test_layers_that_share_private_pages_pack_a_prompt_as_soon_as_the_narrowest_does():
    policy = Settings(policy=parse("pyramid(snapkv(budget=128, window=16))"))
    lengths = np.array([64, 80, 200, 4000])
    wide, narrow = Planner(policy, 16, 192, 64), Planner(policy, 16, 64, 64)
    assert wide.schedule.private_pages(lengths).tolist() == [0, 5, 12, 12]
    assert narrow.schedule.private_pages(lengths).tolist() == [0, 4, 4, 4]
    assert Planner(policy, 16, 192).schedule.private_pages(lengths).tolist() == [0, 0, 0, 12]
    planner = BatchPlanner(16, 192, 64)
    planner.know([policy, Settings(policy=parse("snapkv(budget=32, window=16)"))])
    private = [each.schedule.most_private for each in planner.planners]
    assert private == [12, 2], "of their own, if uniform"


@dataclass(frozen=True, kw_only=True)
class Alternating(Quest):
    """Selects in every other layer, with a budget of the layer's own."""

    name = "alternating"

    def layer_budget(self, layer: int) -> int | None:
        return None if layer % 2 else self.budget + 16 * layer


SELECTING = {
    "dense": [None] * 5,
    "knorm(budget=32)": [None] * 5,
    "quest(budget=32, dense_layers=0)": [32] * 5,
    "quest(budget=48)": [None, None, 48, 48, 48],
    "knorm(budget=64) + quest(budget=32, dense_layers=9)": [None] * 5,
}
"""Tokens that a selecting query of each of five layers reads."""


def reads_of(several, requests, layers):
    """Choice and length of requests that decode -> segments, what each layer reads of them."""
    planner = BatchPlanner(16)
    planner.know(several)
    choice, total = (np.array(each) for each in zip(*requests, strict=True))
    segments = planner.plan(choice, total - 1, total, total - 1)
    asked = []

    def whole(part, select, _):
        assert len(part.row), "nothing is no sequence for a kernel"
        assert not (part.selects & np.isin(part.choice, select)).any()
        asked.append(tuple(part.row.tolist()))
        return part

    reads = planner.by_layer(segments, layers, whole, lambda part: part)
    assert list(reads) == list(layers)
    assert len(asked) == len(set(asked)), "once for all layers alike"
    return segments, reads


@claims
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 200)), min_size=1, max_size=6),
    st.booleans(),
)
def test_a_layer_reads_each_query_once_whole_or_by_its_policys_selection(requests, shortcut):
    budgets = [*SELECTING.values(), [64, None, 96, None, 128]]
    policies = [*map(parse, SELECTING), Composition((Alternating(budget=64),))]
    several = [Settings(policy=policy, shortcut=shortcut) for policy in policies]
    segments, reads = reads_of(several, requests, range(5))
    selects = list(zip(segments.choice.tolist(), segments.selects.tolist(), strict=True))
    for layer, mine in reads.items():
        found = [(row, budget) for part, budget in mine.selected for row in part.row.tolist()]
        if mine.whole is not None:
            found += [(row, None) for row in mine.whole.row.tolist()]
        wanted = [budgets[one][layer] if selected else None for one, selected in selects]
        assert sorted(found) == list(enumerate(wanted))


def test_a_policy_that_leaves_the_first_layers_dense_beside_one_that_does_not():
    several = [
        Settings(policy=parse(line))
        for line in ("quest(budget=48, dense_layers=2)", "quest(budget=64, dense_layers=0)")
    ]
    _, reads = reads_of(several, [(0, 100), (1, 200), (0, 20)], range(4))
    first, later = reads[1], reads[2]
    assert first.whole.row.tolist() == [0, 2]
    assert [(part.row.tolist(), budget) for part, budget in first.selected] == [([1], 64)]
    assert later.whole.row.tolist() == [2], "a short request, which nothing is selected of"
    assert [(part.row.tolist(), budget) for part, budget in later.selected] == [
        ([0], 48), ([1], 64),
    ]  # fmt: skip
    assert first.whole is reads[0].whole
    assert later.whole is reads[3].whole
    assert first.selected[0][0] is later.selected[1][0], "one selection, whatever else is read"


def test_where_no_selection_applies_a_layer_reads_all_that_the_step_brings():
    several = [Settings(policy=parse("quest(budget=48, dense_layers=3)"))]
    segments, reads = reads_of(several, [(0, 100), (0, 200)], range(4))
    assert segments.selects.all()
    for layer in range(3):
        assert reads[layer].whole.row.tolist() == [0, 1]
        assert reads[layer].selected == []
    assert reads[3].whole is None, "every query selects"
    assert reads_of(several, [(0, 20)], [2, 3])[1][3].whole.row.tolist() == [0]
