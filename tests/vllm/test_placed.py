"""Prompts on the host: answers are the selector's own, token for token, and blocks come back.

Every new block is filled with garbage when it is handed out, and every block that leaves a request
with NaN, so that nothing stale can be read unnoticed.
"""

from __future__ import annotations

import pytest

from tests.vllm.test_lifecycle import preemptions, solo

pytestmark = [pytest.mark.engine, pytest.mark.both, pytest.mark.timeout(900)]

S = 32
QUEST = "quest(budget=96, dense_layers=0)"
BUDGET = 3  # pages
ROOM = 4 * (S + 1) * S
"""Tokens: four blocks of a directory, each of which speaks for 33 pages."""
LENGTHS = (700, 300, 165, 97, 31, 64, 1)
POOL = {"max_model_len": 1024, "max_num_batched_tokens": 100, "num_gpu_blocks_override": 160}


def placed(pages, room=ROOM, selector=QUEST):
    return {"policy": f"host(pages={pages}, room={room}) + {selector}"}


@pytest.fixture(scope="module")
def alone(engine, random_llama, prompts):
    """What the selector answers without it, and to a second turn with nothing cached."""
    with engine(random_llama(), {"policy": QUEST}, **POOL) as planned:
        batch = prompts(*LENGTHS)
        answers = planned.generate(batch, 40)
        planned.forget()
        return answers, planned.generate(turns(batch[:2], answers), 8)


def turns(batch, answers):
    return [prompt + answer + [7] for prompt, answer in zip(batch, answers, strict=False)]


def add(planned, name, prompt, tokens=40):
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    planned.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, wanted)


def used(planned) -> int:
    return planned.pool.num_gpu_blocks - 1 - planned.free_blocks


def test_answers_are_the_selectors_own(engine, random_llama, prompts, alone):
    batch, (expected, _) = prompts(*LENGTHS), alone
    with engine(random_llama(), placed(5), enable_prefix_caching=False, **POOL) as planned:
        planned.poison(freed=True)
        free = planned.free_blocks
        assert free == POOL["num_gpu_blocks_override"] - 1 - 4
        assert not used(planned)
        assert planned.generate(batch, 40) == expected
        assert [impl.packed_prompts for impl in planned.impls] == [2] * len(planned.impls)
        assert solo(planned, batch[:2], 40) == expected[:2]
        core = planned.llm.llm_engine
        for steps, held in ((3, 10), (7, 22), (8, 27), (10, 6), (14, 7)):
            add(planned, "doomed", batch[0])
            for _ in range(steps):
                core.step()
            # Chunks of 100 tokens; then hot pages beside all, then those, and what is behind them.
            assert used(planned) == held
            core.abort_request(["doomed"])
            core.step()
            assert planned.free_blocks == free
        assert solo(planned, batch[:1], 40) == expected[:1]


def test_turns_find_the_prompt_in_the_prefix_cache(engine, random_llama, prompts, alone):
    batch, (expected, second) = prompts(*LENGTHS), alone
    with engine(random_llama(), placed(3), **POOL) as planned:
        planned.poison(freed=False)
        free, answers = planned.free_blocks, planned.generate(batch, 40)
        assert answers == expected
        again = planned.run(turns(batch[:2], answers), 8)
        assert [out.num_cached_tokens for out in again] == [len(b) // S * S for b in batch[:2]]
        assert [list(out.outputs[0].token_ids) for out in again] == second
        assert planned.free_blocks == free
        planned.forget()


@pytest.mark.parametrize("caching", [False, pytest.param(True, marks=pytest.mark.cpu)])
def test_preempted_requests_answer_as_before(engine, random_llama, prompts, caching):
    """Coming back, a request computes its answer's tokens several at a time."""
    batch = prompts(224, 256, 240, 231, 97)
    with engine(random_llama(), placed(4), enable_prefix_caching=caching, **POOL) as planned:
        planned.poison(freed=not caching)
        free, expected = planned.free_blocks, planned.generate(batch, 120)
        assert solo(planned, batch[:1], 40) == [expected[0][:40]]
        hostages = planned.pool.get_new_blocks(planned.free_blocks - 21)
        seen = preemptions(planned)
        assert planned.generate(batch, 120) == expected
        assert seen, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free


def test_requests_wait_for_room_on_the_host_or_are_refused(engine, random_llama, prompts):
    """One block of a directory: one prompt at a time that goes to the host."""
    from vllm.exceptions import VLLMValidationError

    batch = prompts(300, 420, 65, 360)
    options = {**POOL, "max_model_len": 2048}
    with engine(random_llama(), placed(4, room=1), **options) as planned:
        planned.poison(freed=False)
        expected = solo(planned, batch, 24)
        most, schedule = [0], planned.scheduler.schedule

        def watch(*args):
            step = schedule(*args)
            most.append(sum(each.num_prompt_tokens > 200 for each in planned.scheduler.running))
            return step

        planned.scheduler.schedule = watch
        assert planned.generate(batch, 24) == expected
        assert max(most) == 1
        (long,) = prompts(1100)
        told = "has 1,100 tokens, and host memory holds 1,056 of all requests; .*room=1100"
        with pytest.raises(VLLMValidationError, match=told):
            planned.generate([long], 4)
        assert planned.generate(batch[:1], 24) == expected[:1]


def test_every_page_brought_from_the_host_is_dense(engine, random_llama, prompts):
    batch = prompts(700, 300, 33, 1)
    with engine(random_llama(), {"policy": "dense"}, **POOL) as planned:
        expected = planned.generate(batch, 24)
    every = {**placed(32, selector="quest(budget=1024, dense_layers=0)"), "shortcut": False}
    with engine(random_llama(), every, enable_prefix_caching=False, **POOL) as planned:
        planned.poison(freed=True)
        assert planned.generate(batch, 24) == expected
        assert [impl.packed_prompts for impl in planned.impls] == [3] * len(planned.impls)


@pytest.mark.cpu
def test_what_was_never_run_is_refused(engine, random_llama):
    for kvplug, options, wanted in (
        (placed(2), {}, "has room for 2; write host.pages=3."),
        (placed(4), {"block_size": 128}, "write --block-size 32"),
        ({**placed(4), "allow": ["snapkv"]}, {}, "cannot share a server"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=wanted), engine(random_llama(), kvplug, **options):
            pass
