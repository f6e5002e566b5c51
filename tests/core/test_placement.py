"""Prompts on the host: which lines name them, and what follows from lengths alone."""

from __future__ import annotations

import numpy as np
import pytest

from kvplug import Planner, Settings, parse, read_offer
from kvplug.advice.capacity import capacity
from kvplug.advice.model import Layer, Model

QUEST = "quest(budget=128, dense_layers=0)"
LINE = f"host(pages=4, room=4000) + {QUEST}"
S = 32


def planner(line=LINE, **settings):
    return Planner(Settings(policy=parse(line), **settings), S)


@pytest.mark.parametrize(
    "line, wanted",
    [
        (
            "host(pages=64)",
            r"chooses; write host\(pages=64, room=131072\) \+ quest",
        ),
        ("host + twilight(dense_layers=0)", "twilight does not choose whole pages by digests"),
        ("host + quest(budget=0.5, dense_layers=0)", "quest: a share of the context, 0.5, grows"),
        ("host + quest(budget=64)", "its first layers read everything.*dense_layers=0"),
        (f"host + {QUEST} + kivi", "never run beside kivi; leave kivi out"),
        (f"host + {QUEST} + xattention", "never run beside xattention; leave xattention out"),
        (f"host + snapkv + {QUEST}", "host and snapkv both answer the stage 'compress'"),
        (f"host(pages=0) + {QUEST}", "pages must be a number of pages, at least 1, got 0"),
        (f"host(room=-1) + {QUEST}", "room must be a number of tokens, at least 1, got -1"),
    ],
)
def test_lines_that_cannot_be_served_say_what_to_write(line, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse(line)


def test_pages_that_do_not_fit_the_line_say_what_to_write():
    with pytest.raises(ValueError, match=r"reads 4 pages of 32 tokens .* write host\(pages=4\)"):
        planner(f"host(pages=3) + {QUEST}")
    with pytest.raises(ValueError, match="blocks have 128; write --block-size 32"):
        Planner(Settings(policy=parse(LINE)), 128)


def test_no_request_chooses_beside_it():
    with pytest.raises(ValueError, match="cannot share a server with other policies"):
        read_offer({"policy": LINE, "allow": ["snapkv"]}, environ={})
    with pytest.raises(ValueError, match="host serves alone"):
        read_offer({"policy": "quest", "allow": ["host"]}, environ={})


def test_a_directorys_page_speaks_for_one_more_than_a_page_has_tokens():
    schedule = planner().schedule
    assert schedule.digests == S + 1
    assert schedule.directory == -(-4000 // S // (S + 1))
    assert schedule.listed(np.array([1, 33, 34, 66, 67])).tolist() == [1, 1, 2, 2, 3]


def test_a_prompt_goes_if_it_has_more_whole_pages_than_are_kept():
    pages = planner().schedule.private_pages(np.array([0, 5 * S + 31, 6 * S, 33 * S, 34 * S]))
    assert pages.tolist() == [0, 0, 5, 5, 6]
    short = planner(min_context=40 * S).schedule.private_pages(np.array([40 * S, 40 * S + 1]))
    assert short.tolist() == [0, 6]
    course = planner().schedule.course(20 * S + 5)
    assert (course.begin, course.column, course.private) == (20 * S + 5, 21, 5)
    assert course.freed(20 * S + 5) == []
    assert course.freed(20 * S + 6) == [(0, 20)]


def test_queries_choose_among_all_that_they_saw_before():
    prompt = np.array([20 * S + 5, 3 * S])
    mine, plain = planner(), planner(QUEST)
    total = prompt + 40
    segments, expected = (each.plan(prompt, total, prompt) for each in (mine, plain))
    assert segments.visible.tolist() == expected.visible.tolist()
    assert segments.selects.tolist() == expected.selects.tolist()
    assert mine.selection(segments).tolist() == plain.selection(expected).tolist()
    away = segments.row == 0
    assert (segments.away == np.where(away, 20, 0)).all()
    # Four hot pages and one of the directory, instead of twenty.
    assert (segments.columns == segments.pages - np.where(away, 15, 0)).all()


def test_a_prompts_own_queries_see_it_where_it_is():
    end = np.array([20 * S + 5])
    segments = planner().plan(end - 100, end + 1, end)
    assert segments.away.tolist() == [0, 20]
    assert segments.stop.tolist() == segments.visible.tolist() == [20 * S + 5, 20 * S + 6]


def test_capacity_counts_what_stays_in_the_pool():
    layers = tuple(Layer(number=n, kv_heads=2, head_dim=64) for n in range(2))
    model = Model(name="m", layers=layers, heads=4, itemsize=4, weights=0, shared=0)
    sizes = {"block_size": S, "prompt": 20 * S, "tokens": 21 * S, "in_flight": S}
    found = [
        capacity(model, read_offer({"policy": line}, environ={}), 1 << 24, **sizes)
        for line in (LINE, QUEST)
    ]
    assert found[0].blocks == found[1].blocks - 4
    assert (found[0].most, found[0].settled) == (20 + 4 + 1, 4 + 1)
    assert found[1].settled == 21
