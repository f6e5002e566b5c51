"""Preempted, aborted, forked and identical requests answer as they would alone.

Every new block is filled with garbage when it is handed out, and every block that leaves a request
with NaN, so that nothing stale can be read unnoticed.
"""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

POLICIES = [
    pytest.param("snapkv(budget=96)", marks=pytest.mark.cpu),
    "snapkv(budget=128) + quest(budget=96, dense_layers=0)",
    "quest(budget=160, top_p=0.9, dense_layers=1)",
    pytest.param("streaming_llm(sinks=4, window=100)", marks=pytest.mark.cpu),
    "streaming_llm(sinks=40, window=150) + quest(budget=96, dense_layers=0)",
    "keydiff(budget=160) + twilight(budget=0.3, dense_layers=0)",
]


def preemptions(engine) -> list[str]:
    """Ids of preempted requests, appended to as it happens."""
    seen: list[str] = []
    preempt = engine.scheduler._preempt_request

    def count(request, *args, **kwargs):
        seen.append(request.request_id)
        return preempt(request, *args, **kwargs)

    engine.scheduler._preempt_request = count
    return seen


def solo(engine, prompts, tokens):
    """What each request answers alone, with nothing cached."""
    answers = []
    for prompt in prompts:
        engine.forget()
        answers += engine.generate([prompt], tokens)
    engine.forget()
    return answers


ROOMY = 128
"""Blocks of a pool that holds all of what these tests ask at once."""


def with_room(engine, prompts, tokens):
    """What requests answer together, with nothing cached and nobody preempted."""
    seen = preemptions(engine)
    answers = engine.generate(prompts, tokens)
    assert not seen
    engine.forget()
    return answers


def leave(engine, blocks):
    """Take blocks of the pool away -> those taken, to be freed."""
    return engine.pool.get_new_blocks(engine.free_blocks - blocks)


@pytest.fixture(scope="module")
def known():
    """What a batch's requests answer with room for all, by policy: with or without a prefix cache
    the same."""
    return {}


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_requests_answer_as_alone(engine, random_llama, prompts, known, policy, caching):
    batch = prompts(224, 256, 240, 231, 97)
    with engine(
        random_llama(),
        {"policy": policy},
        enable_prefix_caching=caching,
        num_gpu_blocks_override=ROOMY,
        max_model_len=512,
        max_num_batched_tokens=128,
    ) as planned:
        planned.poison(freed=not caching)
        free = planned.free_blocks
        if policy not in known:
            known[policy] = with_room(planned, batch, 120)
            assert solo(planned, batch[:1], 40) == [known[policy][0][:40]]
        expected = known[policy]
        hostages = leave(planned, 14 if "streaming" in policy else 29 if "quest" in policy else 21)
        seen = preemptions(planned)
        assert planned.generate(batch, 120) == expected
        assert seen, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free


@pytest.mark.parametrize("policy", POLICIES)
def test_identical_and_forked_requests_answer_as_alone(engine, random_llama, prompts, policy):
    long, short = prompts(333, 95)
    with engine(random_llama(), {"policy": policy}, max_model_len=1024) as planned:
        planned.poison(freed=False)
        expected = solo(planned, [long, short], 20)
        assert planned.generate([long, long, short, long], 20) == [
            expected[0], expected[0], expected[1], expected[0],
        ]  # fmt: skip
        planned.forget()
        # Three samples of one prompt that differ in nothing.
        outputs = planned.run([long], 20, n=3, temperature=1, top_k=1)[0].outputs
        assert [list(output.token_ids) for output in outputs] == [expected[0]] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_aborted_requests_leave_nothing_behind(engine, random_llama, prompts, policy):
    from vllm import SamplingParams

    doomed, bystander, heir = prompts(300, 280, 310)
    with engine(
        random_llama(), {"policy": policy}, max_model_len=512, enable_prefix_caching=False
    ) as planned:
        planned.poison(freed=True)
        free = planned.free_blocks
        expected = solo(planned, [bystander, heir], 16)
        parameters = SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, detokenize=False
        )
        core = planned.llm.llm_engine
        for steps in (0, 1, 2, 3, 5):
            answers = {}

            def collect(outputs, answers=answers):
                for output in outputs:
                    if output.finished:
                        answers[output.request_id] = list(output.outputs[0].token_ids)

            for name, prompt in (("doomed", doomed), ("bystander", bystander)):
                core.add_request(name, {"prompt_token_ids": prompt}, parameters)
            for _ in range(steps):
                collect(core.step())
            core.abort_request(["doomed"])
            core.add_request("heir", {"prompt_token_ids": heir}, parameters)
            while core.has_unfinished_requests():
                collect(core.step())
            assert [answers["bystander"], answers["heir"]] == expected
            assert planned.free_blocks == free
