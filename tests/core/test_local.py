"""Which layers a line makes local, what it may stand beside, and what a server with it refuses."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug import Sharing, parse, read_offer

EDGES = st.none() | st.integers(-12, 12)
STEPS = st.none() | st.integers(-12, -1) | st.integers(1, 12)


def chosen(layers: str, of: int) -> tuple[int, ...]:
    return parse(f"local(layers={layers!r})").local.local_layers(of)


@pytest.mark.parametrize(
    "layers, found",
    [
        ("1::2", (1, 3, 5, 7, 9)),
        ("0,3,8:", (0, 3, 8, 9)),
        (":", tuple(range(10))),
        ("-1", (9,)),
        (" 2 : 4 , 3 ,::-4", (1, 2, 3, 5, 9)),
    ],
)
def test_numbers_and_slices_are_pythons(layers, found):
    assert chosen(layers, 10) == found


@settings(deadline=None)
@given(st.lists(st.tuples(EDGES, EDGES, STEPS), min_size=1), st.integers(1, 12))
def test_any_slices_are_those_of_a_list(slices, of):
    text = ",".join(":".join("" if n is None else str(n) for n in part) for part in slices)
    expected = [range(of)[slice(*part)] for part in slices]
    if all(expected):
        assert chosen(text, of) == tuple(sorted({n for part in expected for n in part}))
    else:
        with pytest.raises(ValueError, match=f"attention layers are 0 to {of - 1}"):
            chosen(text, of)


@pytest.mark.parametrize(
    "layers, part", [("12", "12"), ("0,12", "12"), ("-13", "-13"), ("12:", "12:"), ("3:3", "3:3")]
)
def test_layers_that_the_model_does_not_have(layers, part):
    message = f"layers are 0 to 11, and {part!r} of layers={layers!r} is none of them; write"
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen(layers, 12)


@pytest.mark.parametrize(
    "line",
    [
        "local(window=512, layers='1::2')",
        "local(window=512, layers='1::2') + snapkv(budget=64, sinks=0, window=16, pool=5)",
        "local(window=512, layers='::3') + streaming_llm(sinks=4, window=60) + "
        "quest(budget=64, dense_layers=0)",
    ],
)
def test_the_line_parses_back_and_stands_before_what_it_composes_with(line):
    assert str(parse(line)) == line
    terms = line.split(" + ")
    assert str(parse(" + ".join(reversed(terms)))) == line


def test_it_answers_for_its_own_layers_alone():
    alone = parse('local(layers="1::2")')
    assert alone.local is not None
    assert not alone.is_dense
    assert not alone.plans
    beside = parse('pyramid(snapkv(budget=64)) + quest(budget=9) + local(layers="1::2")')
    without = parse("pyramid(snapkv(budget=64)) + quest(budget=9)")
    assert beside.plans
    assert (beside.scored, beside.selector, beside.eviction, beside.uniform) == (
        without.scored, without.selector, without.eviction, without.uniform,
    )  # fmt: skip
    assert beside.layer_budgets(9) == without.layer_budgets(9)
    assert without.local is None
    assert without.plans
    assert alone.publishes is Sharing.OWN, "all that the server serves sees it"


@pytest.mark.parametrize(
    "line, message",
    [
        ("local", "local needs layers; write local(layers="),
        ("local(layers=3)", 'got 3; write local(layers="1::2")'),
        ('local(layers="")', 'write local(layers="1::2")'),
        ('local(layers="1;3")', "got '1;3'; write local(layers=\"1::2\"), for every second layer"),
        ('local(layers="1,,3")', 'or local(layers="0,3,8:")'),
        ('local(layers="::0")', "got '::0'"),
        ('local(layers="1:2:3:4")', "got '1:2:3:4'"),
        ('local(layers="0", window=0)', "local: window must be a number of tokens, at least 1"),
        ('local(layers="0", window=True)', "got True; write window=1024"),
        ('local(layers="0", window=2147483648)', "below 2 ** 31, got 2147483648"),
        ('local(layers="0") + local(layers="1")', "local and local both answer"),
        ('local(layers="0") + snapkv + knorm', "snapkv and knorm both answer the stage"),
        ('local(layers="0") + dense', "leave dense out"),
    ],
)
def test_bad_lines(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(line)


OWN = {"policy": 'local(layers="1::2", window=512)'}


@pytest.mark.parametrize(
    "given, message",
    [
        ({**OWN, "protect": 64}, "no protected span before it; drop protect, or use"),
        ({**OWN, "min_context": 513}, 'write {"min_context": 512} or less, or a wider window'),
        ({**OWN, "allow": ["quest"]}, "local cannot share a server with other policies"),
        ({"policy": "quest", "allow": ["local"]}, "local cannot share a server"),
    ],
)
def test_what_a_server_with_it_refuses(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_offer(given, environ={})


def test_requests_within_the_window_are_dense_as_min_context_says():
    line = f"{OWN['policy']} + quest(budget=64)"
    offer = read_offer({"policy": line, "min_context": 512}, environ={})
    assert offer.settings.min_context == 512


def test_a_request_chooses_neither_it_nor_dense():
    offer = read_offer(OWN, environ={})
    assert offer.settings_for(OWN["policy"]) == offer.settings
    for line in ("dense", 'local(layers="1::2", window=64)', "quest"):
        with pytest.raises(ValueError, match="lets no request choose"):
            offer.settings_for(line)
