"""Answers that are packed as they grow: against a plain Llama that packs at the same positions."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from tests.plain_llama import Plain
from tests.vllm.test_lifecycle import ROOMY, leave, preemptions, with_room

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32
KEYS = "keydiff(budget=96, interval=64)"
QUERIES = "snapkv(budget=128, window=32, interval=64)"
REDUNDANCY = "r_kv(budget=96, interval=64)"


@pytest.mark.both
@pytest.mark.parametrize("policy", [KEYS, QUERIES, REDUNDANCY])
def test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions(
    engine, random_llama, prompts, policy
):
    model = random_llama(layers=3)
    batch = prompts(40, 333, 97, 230)
    with engine(
        model, {"policy": policy}, dtype="float32", max_model_len=1024, enable_prefix_caching=False
    ) as planned:
        planned.poison(freed=True)
        free = planned.free_blocks
        answers = planned.generate(batch, 260)
        assert planned.free_blocks == free
        alone = planned.generate(batch[2:3], 260)
    plain = Plain(model, policy, S)
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [260] * 4
    assert plain.events > 3 * 3 * 4, "every answer was packed some times"
    assert alone == answers[2:3]
    dense = Plain(model, "keydiff(budget=4096)", S)
    assert all(dense.agrees(*each) < 260 for each in zip(batch, answers, strict=True))


@pytest.mark.parametrize(
    "policy, caching",
    [(QUERIES, True), (f"{KEYS} + twilight(budget=0.5, dense_layers=0)", False)],
)
def test_preempted_answers_are_packed_again_as_before(
    engine, random_llama, prompts, policy, caching
):
    batch = prompts(40, 333, 97, 230, 60)
    with engine(
        random_llama(),
        {"policy": policy},
        enable_prefix_caching=caching,
        num_gpu_blocks_override=ROOMY,
        max_model_len=640,
        max_num_batched_tokens=256,
        dtype="float32",
    ) as planned:
        planned.poison(freed=not caching)
        free = planned.free_blocks
        expected = with_room(planned, batch, 160)
        hostages, seen = leave(planned, 17), preemptions(planned)
        assert planned.generate(batch, 160) == expected
        assert len(seen) >= 3, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free
        for tokens in (1, 160):
            (again,) = planned.run(batch[1:2], tokens)
            assert list(again.outputs[0].token_ids) == expected[1][:tokens]
        last = 32 if "snapkv" in policy else 1
        assert again.num_cached_tokens == (caching and (333 - last) // S * S)


def test_an_answer_of_a_thousand_tokens_holds_what_its_course_says(engine, random_llama, prompts):
    """The engine's own metric at every step; no pool of dense pages would hold it."""
    with engine(
        random_llama(),
        {"policy": KEYS},
        num_gpu_blocks_override=64,
        max_model_len=1500,
        enable_prefix_caching=False,
    ) as planned:
        free = planned.free_blocks
        schedule = planned.builders[0].planner.planners[0].schedule
        core, held = planned.llm.llm_engine, []
        core.add_request(
            "long",
            {"prompt_token_ids": prompts(100)[0]},
            SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False),
        )
        while core.has_unfinished_requests():
            core.step()
            usage = planned.scheduler.kv_cache_manager.usage * free
            held.append(round(usage))
        behind = held[-900:-1]
        assert max(behind) <= 3 + 2 + 2, "kept, new since, and the step's own"
        assert min(behind) >= 3
        in_flight = planned.llm.llm_engine.vllm_config.max_in_flight_tokens
        assert max(held) <= schedule.most_pages(100, in_flight, 1100)
        assert planned.free_blocks == free


def test_requests_with_and_without_an_interval_share_a_batch(engine, random_llama, prompts):
    batch = prompts(40, 333, 97, 230)
    lines = [KEYS, "keydiff(budget=96)", "dense", QUERIES]
    with engine(
        random_llama(),
        {"policy": "dense", "allow": ["keydiff", "snapkv"], "max_budget": 128},
        max_model_len=1024,
        dtype="float32",
    ) as planned:
        planned.poison(freed=False)

        def ask(which):
            given = [
                SamplingParams(
                    temperature=0, max_tokens=200, ignore_eos=True, detokenize=False,
                    extra_args={"kvplug": lines[n]},
                )
                for n in which
            ]  # fmt: skip
            said = planned.llm.generate([{"prompt_token_ids": batch[n]} for n in which], given,
                                        use_tqdm=False)  # fmt: skip
            return [list(each.outputs[0].token_ids) for each in said]

        alone = []
        for n in range(4):
            planned.forget()
            alone += ask([n])
        planned.forget()
        assert ask(range(4)) == alone
        assert ask(range(4)) == alone, "nothing of a packed answer was found by another"
    model = random_llama()
    for n, line in enumerate(lines):
        policy = line if n != 2 else "keydiff(budget=4096)"
        assert Plain(model, policy, S).agrees(batch[n], alone[n]) == 200
