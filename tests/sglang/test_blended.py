"""Chunks taken from elsewhere in SGLang's tree: against a plain Llama that reads each of them
alone and then goes on, and against SGLang's own answer where what was stored is the whole
prompt's."""

from __future__ import annotations

import json
from array import array
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from kvplug import turn
from tests.blended import Blended, crowded, named
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


def rows(engine, tokens, salt):
    """Keys and values that the tree has under a name, by layer. [T, H, D] twice"""
    from kvplug_sglang import compat

    match = compat.match(engine.tree, array("q", tokens), None, salt)
    slots, pool = compat.matched_slots(engine.tree, match), engine.backend.token_to_kv_pool
    return slots, {n: [x[slots] for x in pool.get_kv_buffer(n)] for n in engine.backend.layers}


def test_what_the_whole_prompt_has_of_them_gives_its_own_answer(engine, random_llama, prompts):
    """And its own rows, wherever they lie, with chunks of any length, of requests in one batch."""
    lengths = 70, 131, 96, 200
    *chunks, asks, other = prompts(*lengths, 45, 30, seed=1)
    context, spans = [*chain(*chunks)], named(*lengths)
    with engine(random_llama(layers=3, seed=1), LINE) as blending:
        forget(blending)
        batch = [context + asks, context + other]
        wanted = [answer for answer, _ in ask(blending, *batch, salt="whole")]
        wholes = [rows(blending, prompt, "whole")[1] for prompt in batch]
        read_alone(blending, *chunks)
        pool, rotation = blending.backend.token_to_kv_pool, blending.backend.rotation
        for chunk, (first, _) in zip(chunks, spans, strict=True):
            slots, _ = rows(blending, chunk, None)
            part = slice(first, first + len(slots))
            for layer, (keys, values) in wholes[0].items():
                back = turn(keys[None, part], *rotation.angles(np.array([-first])))[0]
                for stored, its in zip(
                    pool.get_kv_buffer(layer), (back, values[part]), strict=True
                ):
                    stored[slots] = its
        said = ask(blending, *[(prompt, spans) for prompt in batch])
        assert [answer for answer, _ in said] == wanted
        assert said[0][1] == taken(spans, 16) > 400
        for prompt, whole in zip(batch, wholes, strict=True):
            (request,) = (
                each
                for each in blending.requests.values()
                if each.kvplug_asked is not None and [*each.kvplug_asked.prompt] == prompt
            )
            order = request.kvplug_asked.arrangement.order
            _, found = rows(blending, request.origin_input_ids, request.cache_salt)
            for layer, kept in found.items():
                here = order[: len(kept[0])]
                for mine, its in zip(kept, whole[layer], strict=True):
                    both = here < len(its)  # of its last page they have other parts
                    assert both.sum() > 500
                    torch.testing.assert_close(mine[both], its[here[both]], rtol=0, atol=1e-4)
        assert settled(blending, SLOTS)


def admissions(monkeypatch):
    """Request -> by the tokens that it had answered, whether it lay as arranged when it was last
    looked up: as it was admitted then."""
    from kvplug_sglang import blending

    found, take = {}, blending.take

    def note(tree, req, asked):
        moved = take(tree, req, asked)
        found.setdefault(req.rid, {})[len(req.output_ids)] = moved
        return moved

    monkeypatch.setattr(blending, "take", note)
    return found


def test_retracted_aborted_and_evicted_requests_lie_as_they_then_can(
    engine, random_llama, prompts, monkeypatch
):
    line, slots = "blend(links=0)", 1056
    model = random_llama(layers=2)
    asked, chunks = crowded(prompts)
    plain = Blended(model, line, 16)
    small = {"max_total_tokens": slots, "schedule_conservativeness": 0.05}
    found = admissions(monkeypatch)
    with engine(model, line, **small) as blending:
        from sglang.srt.managers import schedule_policy

        from kvplug_sglang import compat

        forget(blending)
        read_alone(blending, *chunks)
        rids = [send(blending, prompt, spans, 70, ignore_eos=False) for prompt, spans in asked]
        blending.drain()
        assert sum(blending.requests[rid].retraction_count for rid in rids), "it is too small"
        lay = set()
        for rid, (prompt, spans) in zip(rids, asked, strict=True):
            answer, times = blending.output(rid), [*found[rid].items(), (70, None)]
            for (begin, moved), (end, _) in pairwise(times):
                said = plain.said(prompt, answer, spans if moved else ())
                assert answer[begin:end] == said[begin:end], (times, begin)
                lay.add(moved)
        assert True in lay
        assert settled(blending, slots)

        # Aborted before, in and behind the step that takes.
        forget(blending)
        read_alone(blending, *chunks)
        for passes in range(3):
            rid, waits = send(blending, *asked[2], 40), [passes]

            def abort(rid=rid, waits=waits):
                waits[0] -= 1
                if waits[0] == -1:
                    blending.abort(rid)

            blending.steps[:] = [abort]
            blending.drain()
            assert len(blending.output(rid)) < 40
            assert settled(blending, slots)

        # Two with the same chunks in one step; and one that finds no room for what it takes.
        forget(blending)
        read_alone(blending, *chunks)
        prompt, spans = asked[0]
        both = ask(blending, (prompt, spans), ([*prompt[:-1], 7, 7, 7], spans), tokens=4)
        assert [cached for _, cached in both] == [taken(spans, 16, links=0)] * 2
        assert plain.agrees(prompt, both[0][0], spans) == 4
        with monkeypatch.context() as patch:
            patch.setattr(compat, "allocate", lambda *args: None)
            ((answer, cached),) = ask(blending, asked[1], tokens=4)
        assert cached == 96, "its prefix"
        assert plain.agrees(asked[1][0], answer) == 4

        # It found its chunks while it waited for room, and they are gone when there is some.
        add, rid = schedule_policy.PrefillAdder.add_one_req, send(blending, *asked[3], 5)

        def full(*args, **kwargs):
            return schedule_policy.AddReqResult.NO_TOKEN

        def evict():
            if found.get(rid) == {0: True}:
                forget(blending)
                monkeypatch.setattr(schedule_policy.PrefillAdder, "add_one_req", add)

        monkeypatch.setattr(schedule_policy.PrefillAdder, "add_one_req", full)
        blending.steps[:] = [evict]
        blending.drain()
        assert found[rid] == {0: False}
        assert plain.agrees(asked[3][0], blending.output(rid)) == 5
        assert settled(blending, slots)


def refused(reason):
    from prometheus_client import REGISTRY

    name = "kvplug_refused_requests_total"
    return REGISTRY.get_sample_value(name, {"reason": reason}) or 0.0


def test_what_a_request_may_not_name_or_want_is_refused_alone(engine, random_llama, prompts):
    a, b, head = prompts(64, 64, 16, seed=5)
    prompt, spans = a + b + head, named(64, 64)
    with engine(random_llama(), LINE) as blending:
        read_alone(blending, a, b)
        asked = [
            ([[0, 64], [64, 145]], {}, "that ends behind 145", "other chunks"),
            ([[0, 64], [60, 145]], {}, "ascending spans of tokens", "unreadable"),
            (
                spans, {"fields": {"return_logprob": True, "logprob_start_len": 3}},
                "leave chunks out, or logprob_start_len", "prompt log-probabilities",
            ),
            (
                spans, {"fields": {"return_hidden_states": True}},
                "leave chunks out, or return_hidden_states", "prompt hidden states",
            ),
        ]  # fmt: skip
        before = [refused(reason) for *_, reason in asked]
        good = send(blending, prompt, spans)
        bad = [send(blending, prompt, chunks, **more) for chunks, more, *_ in asked]
        blending.drain()
        assert blending.cached(good) == taken(spans, 16)
        for rid, (_, _, message, _) in zip(bad, asked, strict=True):
            reason = blending.requests[rid].finished_reason.to_json()
            assert reason["type"] == "abort"
            assert message in reason["message"]
        assert [refused(reason) for *_, reason in asked] == [n + 1 for n in before]

        # Log-probabilities of an answer are no prompt's.
        rid = send(blending, prompt, spans, fields={"return_logprob": True})
        blending.drain()
        assert blending.output(rid) == blending.output(good)
        assert settled(blending, SLOTS)
