"""PyramidKV's budgets: the paper's line, in classes of layers that an engine can free apart."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug import Planner, parse, read_settings
from kvplug.policies import pyramid


def budgets(line: str, layers: int) -> tuple[int, ...]:
    return parse(line).layer_budgets(layers)


def test_three_classes_of_the_papers_line():
    # K - W = 900, min = 45, max = 1755: layer l keeps 100 + 1755 - l * 1710 / 5.
    line = "pyramid(snapkv(budget=1000, window=100), beta=20)"
    assert budgets(line, 6) == (1684, 1684, 1000, 1000, 316, 316)


@given(
    st.integers(1, 80),
    st.integers(1, 4096),
    st.integers(0, 64),
    st.floats(1, 100, allow_nan=False),
)
def test_the_mean_is_the_budget_and_nobody_falls_below_what_always_stays(
    layers, more, sinks, beta
):
    line = f"pyramid(knorm(budget={sinks + more}, sinks={sinks}), beta={beta})"
    found = budgets(line, layers)
    assert len(found) == layers
    assert list(found) == sorted(found, reverse=True)
    assert min(found) >= sinks
    assert abs(np.mean(found) - (sinks + more)) <= 0.5
    sizes = np.unique(np.searchsorted(-np.array(found), -np.array(found)), return_counts=True)[1]
    assert len(sizes) <= 3


def test_the_page_says_what_prompts_shorter_than_the_first_share_keep():
    shares = sorted(set(budgets("pyramid(snapkv(budget=451))", 30)), reverse=True)
    kept = [min(share, 601) for share in shares]
    assert (shares, kept, round(np.mean(kept))) == ([705, 451, 197], [601, 451, 197], 416)
    page = " ".join(pyramid.__doc__.split())
    assert "could keep 705, 451 and 197 and keep 601, 451 and 197, a mean of 416" in page


def test_a_steep_pyramid_is_uniform_only_at_beta_one():
    assert len(set(budgets("pyramid(snapkv(budget=1024), beta=1)", 12))) == 1
    assert not parse("pyramid(snapkv)").uniform
    assert parse("snapkv").uniform


def test_the_line_parses_back_and_composes():
    scored = "snapkv(budget=512, sinks=0, window=64, pool=5)"
    line = f"pyramid({scored}, beta=10) + quest(budget=256, dense_layers=0)"
    assert str(parse(line)) == line
    assert parse(line).scored == parse("snapkv(budget=512)").scored


def test_a_planner_keeps_what_its_layers_keep():
    settings = read_settings({"policy": "pyramid(knorm(budget=100))"}, environ={})
    prompt = np.array([50, 500])
    assert Planner(settings, 16).schedule.private_pages(prompt).tolist() == [0, 7]
    assert Planner(settings, 16, budget=200).schedule.private_pages(prompt).tolist() == [0, 13]


@pytest.mark.parametrize(
    "line, message",
    [
        ("pyramid(quest)", "pyramid wraps a policy that scores a prompt's tokens, got quest"),
        ("pyramid(streaming_llm)", "write pyramid(snapkv(budget=1024))"),
        ("pyramid", "pyramid needs base"),
        ("pyramid(snapkv, beta=0.5)", "beta must be a number of at least 1, got 0.5"),
        ("pyramid(snapkv(budget=9))", "budget must be at least sinks + window = 64"),
        ("pyramid(snapkv) + knorm", "both answer the stage 'compress'"),
    ],
)
def test_bad_lines(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(line)
