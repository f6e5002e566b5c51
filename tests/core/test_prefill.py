"""What a prompt's queries read, against its definition, spelled out one query at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplug import BatchPlanner, Planner, Settings, dense_reads, parse, step_reads
from kvplug.segments import SINKS

claims = hypothesis_settings(max_examples=150, deadline=None)
sizes = st.sampled_from([16, 32, 64])


def step(*requests):
    """(computed, queries, prompt) of each -> computed, total, prompt, [B] each"""
    computed, queries, prompt = (np.array(x, np.int64) for x in zip(*requests, strict=True))
    return computed, computed + queries, prompt


def pages_of(planner, segments, n, position):
    """Logical pages that the query at a position of segment n sees, as the segment says it."""
    kept, first = int(segments.kept[n]), int(segments.first[n])
    before = range(kept) if segments.packed[n] == SINKS else planner.held[:kept].tolist()
    return [*before, *range(first, position // planner.page_size + 1)]


@st.composite
def narrow(draw):
    name = draw(st.sampled_from(["a_shape", "tri_shape"]))
    fields = {
        "sinks": draw(st.integers(0, 150)),
        "window": draw(st.integers(1, 200)),
        "block": draw(st.sampled_from([64, 128])),
        "last": draw(st.integers(0, 80)),
    }
    return f"{name}({', '.join(f'{k}={v}' for k, v in fields.items())})"


@claims
@given(
    narrow(), sizes, st.integers(0, 200), st.integers(1, 420), st.integers(1, 420),
    st.sets(st.integers(1, 419)),
)  # fmt: skip
def test_a_prompt_s_query_sees_its_sinks_and_its_window(line, S, least, total, prompt, cuts):
    policy = parse(line).generate
    planner = Planner(Settings(policy=parse(line), min_context=least), S)
    bounds = [0, *sorted(cut for cut in cuts if cut < total), total]
    seen = 0
    for start, stop in pairwise(bounds):
        segments = planner.plan(*step((9, 1, 4), (start, stop - start, prompt)))
        for n in range(1, len(segments.row)):
            for i in range(segments.start[n], segments.stop[n]):
                begin = i // policy.block * policy.block
                wanted = [
                    p
                    for p in range(i // S + 1)
                    if not least <= i < prompt - policy.last
                    or p * S < policy.sinks
                    or (p + 1) * S > begin - policy.window + 1
                ]
                assert pages_of(planner, segments, n, i) == wanted
                seen += 1
            last = int(segments.stop[n]) - 1
            assert segments.visible[n] == (len(wanted) - 1) * S + last % S + 1
    assert seen == total
    assert not segments.selects.any()


@claims
@given(
    st.integers(0, 60), st.integers(1, 200), st.integers(0, 150), st.integers(1, 200), sizes,
    st.lists(st.tuples(st.integers(0, 80), st.integers(1, 30)), max_size=2),
    st.sets(st.integers(1, 399)),
)  # fmt: skip
def test_beside_an_eviction_nothing_is_read_that_has_left(
    sinks, window, own_sinks, own_window, S, spans, cuts
):
    line = f"streaming_llm(sinks={sinks}, window={window})"
    protect = tuple(sorted((a, a + n) for a, n in spans))
    evicting = Planner(Settings(policy=parse(line), protect=protect), S)
    line += f" + a_shape(sinks={own_sinks}, window={own_window})"
    planner = Planner(Settings(policy=parse(line), protect=protect), S)

    def read(cuts):
        found = []
        for start, stop in pairwise([0, *sorted(cuts), 400]):
            segments = planner.plan(*step((start, stop - start, 380)))
            for n in range(len(segments.row)):
                for i in range(segments.start[n], segments.stop[n]):
                    found.append(pages_of(planner, segments, n, i))
        return found

    found = read(cuts)
    assert found == read(())
    for i, pages in enumerate(found):
        gone = {p for a, b in evicting.evictable(i) for p in range(a, b)}
        kept = [p for p in range(i // S + 1) if p not in gone]
        assert set(pages) <= set(kept) if i < 380 else pages == kept
        least = {p for p in kept if (p + 1) * S > i - min(own_window, window) + 1}
        assert least <= set(pages)


def test_requests_with_settings_of_their_own_have_sinks_of_their_own():
    batch = BatchPlanner(16)
    lines = ("dense", "a_shape(sinks=20, window=30)", "tri_shape(sinks=90, window=1, last=1)")
    batch.know([Settings(policy=parse(line)) for line in lines])
    segments = batch.plan(np.array([2, 0, 1]), *step((300, 1, 400), (300, 1, 400), (300, 1, 400)))
    assert segments.packed.tolist() == [SINKS, -1, SINKS]
    assert segments.kept.tolist() == [6, 0, 2]
    assert segments.first.tolist() == [16, 0, 14]


@pytest.mark.parametrize("line", ["a_shape(sinks=16, window=40)", "tri_shape(window=64, last=9)"])
@pytest.mark.parametrize("beside", ["", " + quest(budget=64)", " + streaming_llm(window=90)"])
def test_what_prompts_read_is_counted_query_by_query(line, beside):
    planner = Planner(Settings(policy=parse(line + beside)), 16)
    requests = step((0, 300, 290), (130, 77, 500), (5, 1, 5), (60, 0, 90))
    segments = planner.plan(*requests)
    reads = step_reads(segments, planner, [None, 64] if "quest" in beside else [None, None])
    dense = dense_reads(*requests)
    read = 0
    for n in np.flatnonzero(~segments.decodes):
        for i in range(segments.start[n], segments.stop[n]):
            read += len(pages_of(planner, segments, n, i)) * 16 - 15 + i % 16
    assert reads.prefill.read == read
    assert reads.prefill.queries == dense.prefill.queries == 290 + 77
    assert reads.prefill.cached == dense.prefill.cached > read
    assert (reads.queries, reads.cached) == (dense.queries, dense.cached)


def test_a_block_that_fits_no_page_is_refused():
    wanted = r"a_shape: a block of 48 queries is neither .* 32 tokens; write a_shape\(block=32\)"
    with pytest.raises(ValueError, match=wanted):
        Planner(Settings(policy=parse("a_shape(block=48)")), 32)
    for size in (16, 24, 48, 96):
        Planner(Settings(policy=parse("a_shape(block=48)")), size)


@pytest.mark.parametrize("budget", ["budget=64", "budget=0.5", "budget=32, interval=32"])
def test_a_window_takes_nothing_from_what_was_packed(budget):
    """While a prompt streams in, what an event left of it is read, whatever the window."""
    chunk = "" if "interval" in budget else ", chunk=128"
    line = f"a_shape(sinks=16, window=32, last=0) + knorm({budget}{chunk})"
    planner = Planner(Settings(policy=parse(line)), 16)
    packs = Planner(Settings(policy=parse(f"knorm({budget}{chunk})")), 16)
    given = step((0, 400, 390))
    begin = int(packs.schedule.course(390).begin)
    for n in range(begin, 400):
        both, alone = (
            each.where((each.start <= n) & (n < each.stop))
            for each in (planner.plan(*given), packs.plan(*given))
        )
        for name in ("kept", "first", "packed", "phase"):
            assert getattr(both, name) == getattr(alone, name), (n, name)
    before = planner.plan(*given)
    assert (before.first[before.stop <= begin] > 0).any(), "but before it"
