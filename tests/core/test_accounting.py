"""What a step reads, against a count of every query in every layer."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug import Labels, Planner, Settings, byte_share, digest_bytes, parse, step_reads

S = 16
POLICIES = [
    "dense",
    "quest(budget=64)",
    "streaming_llm(sinks=20, window=50)",
    "streaming_llm(sinks=4, window=150) + quest(budget=48)",
    "twilight(budget=40)",
    "streaming_llm(sinks=4, window=150) + twilight(budget=0.25)",
]


@dataclass
class Count:
    queries: int = 0
    cached: float = 0.0
    read: float = 0.0
    scanned: float = 0.0


def counted(planner, computed, total, prompt, budgets) -> Count:
    """One query and one layer at a time."""
    count = Count()
    policy = planner.settings.policy
    for b in range(len(total)):
        for i in range(computed[b], total[b]):
            if i < prompt[b]:
                continue
            segment = planner.plan(np.array([i]), np.array([i + 1]), np.array([prompt[b]]))
            sees, pages = int(segment.visible[0]), int(segment.pages[0])
            layers, scans = [], []
            for budget in budgets:
                left_out = 0
                chooses = segment.selects[0] and budget is not None
                if chooses:
                    unit, least = (1, S + 4) if policy.selector.name == "twilight" else (S, 3)
                    tokens = math.ceil(budget * sees) if isinstance(budget, float) else budget
                    keep = max(math.ceil(tokens / unit), least)
                    left_out = max(0, math.ceil(sees / unit) - keep) * unit
                layers.append(sees - left_out)  # the newest unit, the short one, is read
                scans.append(pages * S if chooses else 0)
            count.scanned += np.mean(scans) if scans else 0
            count.queries += 1
            count.cached += i + 1
            count.read += np.mean(layers) if layers else sees
    return count


requests = st.lists(
    st.tuples(st.integers(0, 250), st.integers(0, 40), st.integers(1, 300)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.sampled_from([0, 100]),
    st.booleans(),
    requests,
    st.integers(0, 3),
)
def test_a_step_reads_what_its_queries_read(line, min_context, shortcut, requests, dense_layers):
    policy = parse(line)
    planner = Planner(Settings(policy=policy, min_context=min_context, shortcut=shortcut), S)
    computed, queries, prompt = (np.array(x, np.int64) for x in zip(*requests, strict=True))
    budgets: list[int | None] = [None] * dense_layers
    budgets += [policy.selector.budget if policy.selector else None] * 2
    segments = planner.plan(computed, computed + queries, prompt)
    reads = step_reads(segments, planner, budgets)
    wanted = counted(planner, computed, computed + queries, prompt, budgets)
    assert (reads.queries, reads.cached) == (wanted.queries, wanted.cached)
    assert reads.read == pytest.approx(wanted.read)
    assert reads.scanned == pytest.approx(wanted.scanned)
    assert reads.read <= reads.cached


def test_layers_with_budgets_of_their_own_are_counted_by_them():
    planner = Planner(Settings(policy=parse("quest(budget=128)")), S)
    step = np.array([400]), np.array([401]), np.array([400])
    budgets = [None, 128, 64]
    reads = step_reads(planner.plan(*step), planner, budgets)
    assert reads.read == pytest.approx((401 + (128 - 15) + (64 - 15)) / 3)
    assert reads.read == pytest.approx(counted(planner, *step, budgets).read)


def test_a_prefill_has_no_decode_reads():
    planner = Planner(Settings(policy=parse("quest(budget=48)")), S)
    reads = step_reads(
        planner.plan(np.array([0]), np.array([500]), np.array([500])), planner, [48, 48]
    )
    assert (reads.queries, reads.cached, reads.read) == (0, 0, 0)


def test_one_selecting_query_reads_its_budget():
    planner = Planner(Settings(policy=parse("quest(budget=64)")), S)
    segments = planner.plan(np.array([320 - 1]), np.array([320]), np.array([5]))
    assert step_reads(segments, planner, [64]).read == 64
    assert step_reads(segments, planner, [None, 64]).read == (320 + 64) / 2
    assert step_reads(segments, planner, [None]).read == 320
    assert step_reads(segments, planner, []).read == 320


@pytest.mark.parametrize(
    "tokens, budget, page_size, share",
    [
        (32768, 1024, 32, 1 / 32 + 1 / 32),
        (131072, 2048, 16, 1 / 16 + 1 / 64),
        (1000, 2000, 16, 1 / 16 + 1),
    ],
)
def test_byte_share_is_the_digests_and_the_selection(tokens, budget, page_size, share):
    assert byte_share(tokens, budget, page_size) == pytest.approx(share)


def test_byte_share_counts_the_bytes_of_digests_and_chosen_pages():
    pages, chosen, heads, D, itemsize, rows = 256, 16, 8, 128, 2, 2
    page = 2 * S * heads * D * itemsize  # keys and values
    digest = digest_bytes(rows, heads, D, itemsize)
    assert digest == 4096
    share = (pages * digest + chosen * page) / (pages * page)
    assert byte_share(pages * S, chosen * S, S, rows) == pytest.approx(share)
    assert byte_share(pages * S, chosen * S, S, rows=0) == pytest.approx(chosen / pages)


def test_of_any_number_of_labels_the_first_hundred_are_kept():
    labels = Labels()
    assert [labels(str(n)) for n in range(100)] == [str(n) for n in range(100)]
    assert [labels(str(n)) for n in (7, 100, 99, 5000)] == ["7", "others", "99", "others"]
