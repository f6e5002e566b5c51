"""Chunks taken from elsewhere: against a plain Llama that reads each of them alone and then goes
on, and against what vLLM says of a prompt where what was stored is the whole prompt's."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from kvplug import Rotation, turn
from tests.blended import Blended, crowded, named
from tests.vllm.test_lifecycle import preemptions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32
LINE = "blend(links=8)"
TOKENS = 12
"""Of an answer."""


def params(spans=None, tokens=TOKENS, **more):
    extra = None if spans is None else {"kvplug": {"chunks": spans}}
    return SamplingParams(
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        max_tokens=tokens,
        extra_args=extra,
        **more,
    )


def ask(engine, *asked, tokens=TOKENS, **more):
    """All at once: prompts, or pairs of them and their chunks. -> (answer, cached tokens) each"""
    asked = [one if isinstance(one, tuple) else (one, None) for one in asked]
    said = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in asked],
        [params(spans, tokens, **more) for _, spans in asked],
        use_tqdm=False,
    )
    for (prompt, _), each in zip(asked, said, strict=True):
        assert each.prompt_token_ids == prompt, "the user's own list"
    return [(list(each.outputs[0].token_ids), each.num_cached_tokens) for each in said]


def read_alone(engine, *chunks, **more):
    ask(engine, *chunks, tokens=1, **more)


@pytest.mark.both
def test_chunks_in_any_order_answer_by_the_definition(engine, random_llama, prompts):
    model = random_llama(layers=3)
    a, b, c, asks, other, head = prompts(128, 100, 170, 45, 30, 20)
    plain = Blended(model, LINE, S)
    # Prompts are cut within link tokens.
    with engine(model, {"policy": LINE}, max_num_batched_tokens=48) as blending:
        blending.poison(freed=False)
        free = blending.free_blocks
        first = a + b + c + asks, named(128, 100, 170)
        ((whole, cached),) = ask(blending, first)
        assert cached == 0, "nothing was read alone"
        assert plain.agrees(first[0], whole) == TOKENS
        read_alone(blending, b, c)
        assert blending.free_blocks == free
        ((answer, cached),) = ask(blending, first)
        assert (answer, cached) == (whole, 416), "all of it is there, as it was read in order"
        asked = {
            "another question": ((a + b + c + other, first[1]), 128 + 64 + 128),
            "another order": ((c + a + b + asks, named(170, 128, 100)), 160 + 96 + 64),
            "not at its start": ((head + b + c + asks, named(100, 170, first=20)), 64 + 128),
            "with something between": ((a + head + c + asks, [[0, 128], [148, 318]]), 128 + 128),
            "twice": ((b + b + b + asks, named(100, 100, 100)), 96 + 64 + 64),
            "nothing behind": ((b + a, named(100, 128)), 96 + 64),
            "too short to take": ((head + head + asks, named(20, 20)), 0),
            "one unknown": ((a + asks + other, named(128, 45)), 128),
            "no chunks": ((c + other, None), 160),
        }
        alone = {}
        blending.forget()
        read_alone(blending, a, b, c)
        for name, ((prompt, spans), hit) in asked.items():
            ((alone[name], cached),) = ask(blending, (prompt, spans))
            taken = () if name in ("one unknown", "no chunks", "too short to take") else spans
            assert cached == hit, name
            assert plain.agrees(prompt, alone[name], taken) == TOKENS, name
        assert plain.agrees(first[0][:-45] + other, alone["another question"]) < TOKENS

        # What they left serves who comes with the same chunks, and nobody else.
        again = [ask(blending, one)[0] for one, _ in asked.values()]
        assert [answer for answer, _ in again] == [*alone.values()]
        for ((prompt, _), _), (_, cached) in zip(asked.values(), again, strict=True):
            assert cached == (len(prompt) - 1) // S * S
        prompt, _ = asked["another order"][0]
        turn = prompt + alone["another order"] + other
        ((answer, cached),) = ask(blending, (turn, named(170, 128, 100)))
        assert cached == (len(prompt) + TOKENS - 1) // S * S, "the answer before is part of it"
        assert plain.agrees(turn, answer, named(170, 128, 100)) == TOKENS
        lies = [*c[:160], *a[32:], *b[32:96]]
        assert ask(blending, lies + other)[0][1] == 160, "its prefix"
        assert ask(blending, (turn, named(170, 129, 99)))[0][1] <= 160

        blending.forget()
        read_alone(blending, a, b, c)
        batch = ask(blending, *[one for one, _ in asked.values()])
        assert [answer for answer, _ in batch] == [*alone.values()]
        assert [cached for _, cached in batch] == [hit for _, hit in asked.values()]
        assert blending.free_blocks == free


def recorded_rows(engine):
    """Blocks of each request that ended, in order, appended to as they end."""
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    found, stock = [], manager.pop_blocks_for_free

    def pop(request_id):
        found.append([block.block_id for block in manager.req_to_blocks[request_id]])
        return stock(request_id)

    manager.pop_blocks_for_free = pop
    return found


def store_as_in_whole(engine, whole, alone, start, tokens):
    """Write over a chunk's blocks what the whole prompt's have of it, as if it began at 0."""
    for layer in engine.layers.values():
        impl, cache = layer.impl, layer.kv_cache
        rotation = Rotation.of(engine.config.model_config.hf_text_config, impl.head_size)
        keys, values = (
            rows[0, start : start + tokens]
            for rows in impl.read_pages(layer, cache, torch.tensor([whole]))
        )
        back = turn(keys[None], *rotation.angles(np.array([-start])))[0]
        slots = (torch.tensor(alone)[:, None] * S + torch.arange(S)).flatten()[:tokens]
        impl.do_kv_cache_update(layer, back.contiguous(), values.contiguous(), cache, slots)


def test_what_the_whole_prompt_has_of_them_gives_its_own_answer(engine, random_llama, prompts):
    """And its log-probabilities, with chunks of any length, of requests in one batch."""
    model = random_llama(layers=3, seed=1)
    lengths = 70, 131, 96, 200
    *chunks, asks, other = prompts(*lengths, 45, 30, seed=1)
    context = [*chain(*chunks)]
    with engine(model, {"policy": LINE}) as blending:
        rows = recorded_rows(blending)

        def say(*asked):
            said = blending.llm.generate(
                [{"prompt_token_ids": prompt} for prompt, _ in asked],
                [params(spans, logprobs=0) for _, spans in asked],
                use_tqdm=False,
            )
            return [(e.outputs[0].token_ids, e.outputs[0].cumulative_logprob) for e in said]

        asked = [context + asks, context + other]
        wanted = say(*[(prompt, None) for prompt in asked])
        blending.forget()
        ask(blending, context + asks, tokens=1)
        whole = rows[-1]
        first, spans = 0, named(*lengths)
        blocks = []
        for chunk in chunks:
            read_alone(blending, chunk)
            blocks.append(rows[-1])
        for (first, last), alone in zip(spans[1:], blocks[1:], strict=True):
            store_as_in_whole(blending, whole, alone, first, last - first)
        pool = blending.pool
        for block in whole[len(chunks[0]) // S :]:  # else it is served as it is
            pool._maybe_evict_cached_block(pool.blocks[block])
        said = say(*[(prompt, spans) for prompt in asked], (chunks[1] + other, None))
        for (tokens, share), (own, its) in zip(said, wanted, strict=False):
            assert tokens == own
            assert share == pytest.approx(its, abs=1e-3)
        ((_, cached),) = ask(blending, (context + asks[:-1], spans))
        assert cached >= 64 + 96 + 64 + 160

        # What is computed in the same step is not there yet.
        one, two, more = prompts(64, 70, 20, seed=2)
        prompt, spans = two + one + more, named(70, 64)
        (*_, (answer, cached)) = ask(blending, one, two, (prompt, spans), tokens=1)
        assert cached == 64, "its prefix, as vLLM has it"
        blending.forget()
        assert ask(blending, prompt, tokens=1) == [(answer, 0)]
        blending.forget()
        read_alone(blending, one, two)
        assert ask(blending, (prompt, spans), tokens=1)[0][1] == 64 + 32


def admissions(engine):
    """Prompt -> by the tokens that it had answered, whether it lay as arranged when it was last
    looked up: as it was admitted then."""
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    found, stock = {}, manager._arrange

    def look(request):
        taking = stock(request)
        if request in manager.asked:
            times = found.setdefault(tuple(manager.asked[request].prompt), {})
            times[request.num_output_tokens] = taking is not None
        return taking

    manager._arrange = look
    return found


SMALL = {"num_gpu_blocks_override": 34, "max_num_batched_tokens": 128, "max_model_len": 400}


def check_crowd(blending, plain, asked):
    """Requests that preempt one another answer as they lay, each time that they were admitted."""
    free = blending.free_blocks
    found, seen = admissions(blending), preemptions(blending)
    said = ask(blending, *asked, tokens=70)
    assert seen, "the pool was meant to be too small"
    for (prompt, spans), (answer, _) in zip(asked, said, strict=True):
        times = [*found[tuple(prompt)].items(), (70, None)]
        for (begin, arranged), (end, _) in pairwise(times):
            wanted = plain.said(prompt, answer, spans if arranged else ())
            assert answer[begin:end] == wanted[begin:end], (times, begin)
    assert any(arranged for times in found.values() for arranged in times.values())
    assert blending.free_blocks == free
    return found


@pytest.mark.both
def test_preempted_aborted_and_evicted_requests_lie_as_they_then_can(
    engine, random_llama, prompts
):
    """Without link tokens, so that a step may have one query of each request, prompts' last
    tokens among them, which a graph replays."""
    line = "blend(links=0)"
    model = random_llama(layers=2)
    asked, (a, b, c) = crowded(prompts)
    plain = Blended(model, line, S)
    with engine(model, {"policy": line}, **SMALL) as blending:
        blending.poison(freed=False)
        free = blending.free_blocks
        read_alone(blending, a, b, c)
        for prompt, spans in asked[:2]:
            ((answer, cached),) = ask(blending, (prompt, spans), tokens=5)
            assert cached == 96 + 64 + 64
            assert plain.agrees(prompt, answer, spans) == 5
        found = check_crowd(blending, plain, asked)

        # Aborted in the step that takes: what it holds returns, and what it took stays.
        blending.forget()
        read_alone(blending, a, b, c)
        llm = blending.llm.llm_engine
        for steps in range(3):
            llm.add_request(
                f"gone {steps}", {"prompt_token_ids": asked[2][0]}, params(asked[2][1])
            )
            for _ in range(steps):
                llm.step()
            llm.abort_request([f"gone {steps}"])
        while llm.has_unfinished_requests():
            llm.step()
        assert blending.free_blocks == free

        # It found its chunks while it waited for room, and they are gone when there is some.
        blending.forget()
        read_alone(blending, a, b, c)
        found.clear()
        llm.add_request("late", {"prompt_token_ids": asked[3][0]}, params(asked[3][1], 5))
        hostages = blending.pool.get_new_blocks(free - 9)
        llm.step()
        assert not blending.scheduler.running
        assert found == {tuple(asked[3][0]): {0: True}}
        hostages += blending.pool.get_new_blocks(9)
        blending.pool.free_blocks(hostages)
        said = []
        while llm.has_unfinished_requests():
            said = llm.step() or said
        answer = list(said[0].outputs[0].token_ids)
        assert found == {tuple(asked[3][0]): {0: False}}
        assert plain.agrees(asked[3][0], answer) == 5
        assert blending.free_blocks == free


@pytest.mark.cpu
@pytest.mark.started
def test_two_ranks_of_their_own_processes_hear_how_a_request_lies(engine, random_llama, prompts):
    line = "blend(links=8)"
    model = random_llama(layers=2)
    asked, chunks = crowded(prompts)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(model, {"policy": line}, **SMALL, **ranks) as blending:
        read_alone(blending, *chunks)
        check_crowd(blending, Blended(model, line, S), asked)
