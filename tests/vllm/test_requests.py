"""Each request its own policy: together they answer as each would in an engine set to it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OFFER = {
    "policy": "knorm(budget=64)",
    "allow": ["snapkv", "keydiff", "random", "quest"],
    "max_budget": 160,
}
ASKED: list[str | None] = [
    None,
    "snapkv(budget=96, window=20)",
    "quest(budget=96, dense_layers=0)",
    "dense",
    "snapkv(budget=160, window=64) + quest(budget=64, dense_layers=1)",
    "quest(budget=160, top_p=0.9, dense_layers=1)",
    '{"budget": 128, "protect": [[40, 70]]}',
    '{"policy": "random(budget=96)", "min_context": 300}',
]


def settings_of(asked: str | None) -> dict[str, Any]:
    """The engine whose own policy is what a request of the offer asks for."""
    from kvplug import read_offer

    chosen = read_offer(OFFER, environ={}).settings_for(asked)
    return {
        "policy": str(chosen.policy),
        "min_context": chosen.min_context,
        "protect": [list(span) for span in chosen.protect],
    }


def parameters(asked: str | None, tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if asked is None else {"kvplug": asked},
        **more,
    )


def generate(engine, batch, tokens: int = 20) -> list[list[int]]:
    """batch: (prompt, what it asks for), all at once -> output tokens each."""
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in batch],
        [parameters(asked, tokens) for _, asked in batch],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def model(random_llama):
    return random_llama(heads=6, kv_heads=2, layers=2)


@pytest.fixture(scope="module")
def alone(engine, model):
    """What a prompt answers alone in an engine set to a policy, by prompt and policy."""
    known: dict[tuple[Any, ...], list[int]] = {}

    def answers(wanted, tokens=20):
        for asked in ASKED:
            missing = [p for p, a in wanted if a == asked and (tuple(p), a, tokens) not in known]
            if not missing:
                continue
            with engine(model, settings_of(asked), max_model_len=1024) as own:
                for prompt in missing:
                    own.forget()
                    known[tuple(prompt), asked, tokens] = own.generate([prompt], tokens)[0]
        return [known[tuple(prompt), asked, tokens] for prompt, asked in wanted]

    return answers


def test_a_batch_of_policies_answers_as_each_alone(engine, model, prompts, alone):
    batch = list(zip(prompts(700, 530, 450, 333, 610, 290, 400, 310), ASKED, strict=True))
    later = [(prompt + batch[0][0][:50], asked) for prompt, asked in batch]
    expected = alone(batch), alone(later)
    dense = alone([(prompt, "dense") for prompt, _ in batch])
    changed = [a != d for a, d in zip(expected[0], dense, strict=True)]
    assert sum(changed) >= 6, "the budgets were small enough to matter"
    with engine(model, OFFER, max_model_len=1024) as mixed:
        mixed.poison(freed=False)
        free = mixed.free_blocks
        assert generate(mixed, batch) == expected[0]
        assert generate(mixed, batch[::-1]) == expected[0][::-1], "over the prefix cache"
        assert generate(mixed, later) == expected[1], "a turn later"
        mixed.forget()
        assert mixed.free_blocks == free


def test_one_prompt_in_flight_under_every_policy(engine, model, prompts, alone):
    (prompt,) = prompts(430)
    batch = [(prompt, asked) for asked in ASKED]
    expected = alone(batch)
    assert len(set(map(tuple, expected))) > 4
    with engine(model, OFFER, max_model_len=1024) as mixed:
        mixed.poison(freed=False)
        assert generate(mixed, batch) == expected
        assert generate(mixed, batch[4:] + batch[:4]) == expected[4:] + expected[:4]
        # What one policy decoded is in nobody else's prefix.
        turns = [(prompt + answer, "dense") for answer in expected]
        assert generate(mixed, turns) == alone(turns)


def test_preempted_requests_keep_their_policies(engine, model, prompts, alone):
    batch = list(zip(prompts(224, 256, 240, 231, 290), ASKED[:5], strict=True))
    expected = alone(batch, 120)
    with engine(
        model, OFFER, num_gpu_blocks_override=30, max_model_len=512, max_num_batched_tokens=128
    ) as mixed:
        mixed.poison(freed=False)
        free, seen = mixed.free_blocks, []
        preempt = mixed.scheduler._preempt_request
        mixed.scheduler._preempt_request = lambda request, *args, **more: (
            seen.append(request.request_id), preempt(request, *args, **more)
        )[1]  # fmt: skip
        assert generate(mixed, batch, 120) == expected
        assert seen, "the pool was meant to be too small"
        assert mixed.free_blocks == free


def test_a_server_that_offers_nothing_says_so(engine, model, prompts):
    from vllm.exceptions import VLLMValidationError

    (prompt,) = prompts(40)
    with (
        engine(model, {"policy": "quest(budget=96)"}, max_model_len=512) as fixed,
        pytest.raises(VLLMValidationError, match="lets no request choose"),
    ):
        generate(fixed, [(prompt, "quest(budget=64)")])


TOKENS = 24
event = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 4), st.sampled_from(ASKED)),
    st.tuples(st.just("step"), st.integers(1, 6), st.none()),
    st.tuples(st.just("abort"), st.integers(0, 9), st.none()),
)


class Traffic:
    """Requests of a live engine, and what each of them must answer."""

    names = itertools.count()

    def __init__(self, engine, prompts, answers) -> None:
        self.engine, self.core = engine, engine.llm.llm_engine
        self.prompts, self.answers = prompts, answers
        self.live: dict[str, tuple[int, str | None]] = {}
        self.finished = 0

    def add(self, which, asked) -> None:
        name = f"t{next(self.names)}"
        prompt = {"prompt_token_ids": self.prompts[which]}
        self.core.add_request(name, prompt, parameters(asked, TOKENS))
        self.live[name] = which, asked

    def step(self) -> None:
        for output in self.core.step():
            if output.finished:
                request = self.live.pop(output.request_id)
                assert list(output.outputs[0].token_ids) == self.answers[request], request
                self.finished += 1

    def abort(self, which) -> None:
        if self.live:
            name = sorted(self.live)[which % len(self.live)]
            self.core.abort_request([name])
            del self.live[name]

    def drain(self) -> None:
        while self.core.has_unfinished_requests():
            self.step()
        assert not self.live


# One engine from here on: a process holds one at a time, so what is to be answered comes first.


@pytest.fixture(scope="module")
def traffic(engine, model, prompts, alone):
    base = prompts(40, 150, 161, 224, 300, seed=1)  # of some, one is another's prefix
    asked = [base[0], base[4][:100] + base[1][:50], base[2], base[4][:224], base[4]]
    wanted = [(which, asks) for asks in ASKED for which in range(len(asked))]
    expected = alone([(asked[which], asks) for which, asks in wanted], TOKENS)
    answers = dict(zip(wanted, expected, strict=True))
    with (
        engine(
            model, OFFER, max_model_len=512, num_gpu_blocks_override=44, max_num_batched_tokens=96
        ) as mixed,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("kvplug.batch.REMEMBERED", 2)  # numbers of settings change all the time
        mixed.poison(freed=False)
        yield Traffic(mixed, asked, answers)


@pytest.mark.parametrize(
    "asked, message",
    [
        ("snapkv(budget=161)", "may keep at most 160 tokens"),
        ("streaming_llm", "does not allow streaming_llm"),
        ("pyramid(snapkv)", "does not allow pyramid"),
        ("snapkv(budget=", "cannot read the policy"),
        (7, "a request names a policy such as"),
        (f"quest(budget=1{'0' * 30})", "budget must be below"),
        ('{"policy": ' + "[" * 9000, "nested too deeply"),
    ],
)
def test_a_bad_value_is_rejected_when_it_arrives_and_nobody_notices(traffic, asked, message):
    from vllm.exceptions import VLLMValidationError

    traffic.add(4, ASKED[1])
    traffic.step()
    with pytest.raises(VLLMValidationError, match=message):
        traffic.core.add_request(
            "bad", {"prompt_token_ids": traffic.prompts[0]}, parameters(asked, TOKENS)
        )
    traffic.drain()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(event, min_size=3, max_size=25))
def test_no_schedule_of_a_live_engine_changes_an_answer_or_leaks_a_block(traffic, events):
    traffic.engine.forget()
    free = traffic.engine.free_blocks
    for kind, which, asked in events:
        if kind == "add":
            traffic.add(which, asked)
        elif kind == "abort":
            traffic.abort(which)
        else:
            for _ in range(which):
                traffic.step()
    traffic.drain()
    assert traffic.engine.free_blocks == free


def test_five_hundred_requests_leave_every_block_free(traffic):
    traffic.engine.forget()
    free, source = traffic.engine.free_blocks, random.Random(0)
    begun = traffic.finished
    for number in range(500):
        traffic.add(source.randrange(5), source.choice(ASKED))
        if number % 11 == 0:
            traffic.abort(source.randrange(10))
        while len(traffic.live) > 10:
            traffic.step()
    traffic.drain()
    assert traffic.finished - begun == 500 - 46
    assert traffic.engine.free_blocks == free
    manager = traffic.engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    assert not manager.held


def test_where_pages_carry_codes_all_choose_by_them(engine, model, prompts):
    """A dense server's pages are as large as what any request may ask for needs."""
    batch = prompts(448, 512, 300, 97)
    asked = ["quest(budget=96, dense_layers=0)", "twilight(budget=64, dense_layers=0)",
             "block_quest(budget=160, sinks=32)", None]  # fmt: skip
    wanted = []
    for line, prompt in zip(asked, batch, strict=True):
        with engine(model, {"policy": line or "dense"}) as own:
            wanted += own.generate([prompt], 20)
    offer = {"policy": "dense", "allow": ["quest", "twilight", "block_quest"]}
    with engine(model, offer) as planned:
        alone = [generate(planned, [each])[0] for each in zip(batch, asked, strict=True)]
        assert alone == wanted
        planned.forget()
        assert generate(planned, list(zip(batch, asked, strict=True))) == wanted
