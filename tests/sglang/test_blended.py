"""Chunks taken from elsewhere in SGLang's tree: against a plain Llama that reads each of them alone
and then goes on, and against SGLang's own answer where what was stored is the whole prompt's."""

from __future__ import annotations

import json

import pytest

from tests.blended import Blended, named
from tests.sglang.test_answers import settled

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

LINE = "blend(links=8)"
TOKENS = 12
"""Of an answer."""
SLOTS = 16384


def send(engine, prompt, spans=None, tokens=TOKENS, **more):
    policy = None if spans is None else json.dumps({"chunks": spans})
    return engine.send(prompt, tokens, policy, **more)


def ask(engine, *asked, tokens=TOKENS, **more):
    """All at once: prompts, or pairs of them and their chunks. -> (answer, cached tokens) each"""
    asked = [one if isinstance(one, tuple) else (one, None) for one in asked]
    rids = [send(engine, prompt, spans, tokens, **more) for prompt, spans in asked]
    engine.drain()
    return [(engine.output(rid), engine.cached(rid)) for rid in rids]


def read_alone(engine, *chunks, **more):
    ask(engine, *chunks, tokens=1, **more)


def forget(engine):
    """Whoever reads what was not written since finds no number."""
    engine.forget()
    for layer in engine.backend.layers:
        for each in engine.backend.token_to_kv_pool.get_kv_buffer(layer):
            each.fill_(float("nan"))


def taken(spans, size, links=8):
    """Tokens of whole pages of chunks, but for the first ones of each that does not come first."""
    anew = -(-links // size)
    return sum(((b - a) // size - anew * (a > 0)) * size for a, b in spans)


@pytest.mark.parametrize("size, overlap", [(16, True), (1, False)])
def test_chunks_in_any_order_answer_by_the_definition(
    engine, random_llama, prompts, size, overlap
):
    model = random_llama(layers=3)
    a, b, c, asks, other, head = prompts(128, 100, 170, 45, 30, 20)
    plain = Blended(model, LINE, size)
    # Prompts are cut within link tokens.
    options = {"chunked_prefill_size": 48, "disable_overlap_schedule": not overlap}
    with engine(model, LINE, page_size=size, **options) as blending:
        forget(blending)
        first = a + b + c + asks, named(128, 100, 170)
        ((whole, cached),) = ask(blending, first)
        assert cached == 0, "nothing was read alone"
        assert plain.agrees(first[0], whole) == TOKENS
        read_alone(blending, b, c)
        ((answer, cached),) = ask(blending, first)
        assert (answer, cached) == (whole, 442 // size * size), "as it was read in order"
        asked = {
            "another question": (a + b + c + other, first[1]),
            "another order": (c + a + b + asks, named(170, 128, 100)),
            "not at its start": (head + b + c + asks, named(100, 170, first=20)),
            "with something between": (a + head + c + asks, [[0, 128], [148, 318]]),
            "twice": (b + b + b + asks, named(100, 100, 100)),
            "one unknown": (a + asks + other, named(128, 45)),
            "no chunks": (c + other, None),
        }
        in_order = ("one unknown", "no chunks")
        alone = {}
        forget(blending)
        read_alone(blending, a, b, c)
        for name, (prompt, spans) in asked.items():
            ((alone[name], cached),) = ask(blending, (prompt, spans))
            took = () if name in in_order else spans
            hit = {"one unknown": 128, "no chunks": 170}.get(name, taken(took, size))
            assert cached == hit // size * size, name
            assert plain.agrees(prompt, alone[name], took) == TOKENS, name
        assert plain.agrees(first[0][:-45] + other, alone["another question"]) < TOKENS
        assert settled(blending, SLOTS)

        # What they left serves who comes with the same chunks, and nobody else.
        for name, (prompt, spans) in asked.items():
            ((answer, cached),) = ask(blending, (prompt, spans))
            assert answer == alone[name]
            assert cached == (len(prompt) - 1) // size * size, name
        prompt, spans = asked["another order"]
        turn = prompt + alone["another order"] + other
        ((answer, cached),) = ask(blending, (turn, spans))
        assert cached == (len(prompt) + TOKENS - 1) // size * size, "the answer is part of it"
        assert plain.agrees(turn, answer, spans) == TOKENS
        moved = blending.requests[next(reversed(blending.requests))].origin_input_ids
        assert ask(blending, list(moved) + other)[0][1] == 170 // size * size, "its prefix"
        assert ask(blending, (turn, named(170, 129, 99)))[0][1] <= 170
        assert ask(blending, (turn, spans), salt="another's")[0][1] == 0

        forget(blending)
        read_alone(blending, a, b, c)
        batch = ask(blending, *asked.values())
        assert [answer for answer, _ in batch] == [*alone.values()]
        assert settled(blending, SLOTS)
