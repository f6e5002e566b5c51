"""Boundaries that random cases meet too seldom: the last number on one side, the first beyond."""

import numpy as np
import pytest

from kvplug import BatchPlanner, Planner, read_offer, read_settings

S = 16


def settings(line, **given):
    return read_settings({"policy": line, **given}, environ={})


def test_a_request_of_exactly_min_context_tokens_sees_past_its_window():
    planner = Planner(settings("streaming_llm(sinks=16, window=32)", min_context=200), S)
    assert planner.first_pages(np.array([199, 200])).tolist() == [0, 169 // S]


@pytest.mark.parametrize(
    "computed, total, packs",
    [(60, 100, False), (60, 101, True), (100, 101, True), (101, 102, False)],
)
def test_a_prompt_of_100_tokens_is_packed_by_the_step_that_computes_the_one_behind(
    computed, total, packs
):
    steps = np.array([[computed], [total], [100]])
    one = settings("knorm(budget=64)")
    assert len(Planner(one, S).schedule.events(*steps)) == packs
    batch = BatchPlanner(S)
    batch.know([settings("dense"), one])
    assert len(batch.events(np.array([1]), *steps)) == packs
    assert not batch.events(np.array([0]), *steps)


def test_a_request_may_keep_exactly_max_budget():
    offer = read_offer(
        {"policy": "dense", "allow": ["knorm"], "max_budget": 128}, environ={}
    )  # fmt: skip
    assert offer.settings_for("knorm(budget=128)").policy.scored.budget == 128
    with pytest.raises(ValueError, match="at most 128 tokens"):
        offer.settings_for("knorm(budget=129)")
