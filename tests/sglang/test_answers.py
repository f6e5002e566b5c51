"""Answers that are packed as they grow: against a plain Llama that packs at the same positions."""

from __future__ import annotations

import pytest

from tests.plain_llama import Plain

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KEYS = "keydiff(budget=96, interval=64)"
QUERIES = "snapkv(budget=128, window=32, interval=64)"


def settled(planned, slots: int) -> bool:
    """Nothing is held any more, in the tree or by a request."""
    from kvplug_sglang.settings import Engine

    return sum(planned.free) == slots and not Engine.serving().router.tenants


@pytest.mark.parametrize(
    "policy, page_size, overlap", [(KEYS, 16, True), (KEYS, 1, False), (QUERIES, 16, True)]
)
def test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions(
    engine, random_llama, prompts, policy, page_size, overlap
):
    model = random_llama(layers=3)
    batch = prompts(40, 333, 97, 230)
    with engine(
        model, policy, page_size=page_size, disable_overlap_schedule=not overlap
    ) as planned:
        answers = planned.generate(batch, 260)
        assert settled(planned, 16384)
        planned.forget()
        assert planned.generate(batch[2:3], 260) == answers[2:3]
        again = planned.send(batch[1], 260)
        planned.drain()
        assert planned.output(again) == answers[1]
        assert settled(planned, 16384)
    plain = Plain(model, policy, page_size)
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [260] * 4
    assert plain.events > 3 * 3 * 4, "every answer was packed some times"


@pytest.mark.parametrize(
    "policy", ["tova(budget=96, interval=64)", f"{KEYS} + twilight(budget=0.5, dense_layers=0)"]
)
def test_retracted_answers_are_packed_again_as_before(
    engine, random_llama, prompts, monkeypatch, policy
):
    """By SGLang's own switch for tests: what is bounded runs short of no pool."""
    batch = prompts(40, 333, 97, 230, 150, seed=4)
    with engine(random_llama(), policy) as planned:
        import sglang.srt.managers.scheduler as scheduling

        undisturbed = planned.generate(batch, 240)
        planned.forget()
        monkeypatch.setattr(scheduling, "TEST_RETRACT", True)
        monkeypatch.setattr(scheduling, "TEST_RETRACT_INTERVAL", 83)
        rids = [planned.send(prompt, 240) for prompt in batch]
        planned.drain()
        assert sum(planned.requests[rid].retraction_count for rid in rids) >= 3
        assert [planned.output(rid) for rid in rids] == undisturbed
        assert settled(planned, 16384)


def test_an_answer_holds_what_it_keeps_and_what_is_new_since(engine, random_llama, prompts):
    """At every pass of the event loop."""
    with engine(random_llama(), KEYS, max_total_tokens=1024) as planned:
        rid = planned.send(prompts(100)[0], 850)
        held = []
        planned.steps.append(lambda: held.append(1024 - sum(planned.free)))
        planned.drain()
        assert len(planned.output(rid)) == 850
        assert max(held[150:]) <= 96 + 64 + 2 * 16, "kept, new since, and the step's own"
        assert settled(planned, 1024)
        counted = planned.counted()
        assert counted["packed_prompts"] == 1
        assert counted["dropped_tokens"] > 700


def test_requests_with_and_without_an_interval_share_a_batch(engine, random_llama, prompts):
    batch = prompts(40, 333, 97, 230)
    lines = [KEYS, "keydiff(budget=96)", "dense", QUERIES]
    offer = '{"policy": "dense", "allow": ["keydiff", "snapkv"], "max_budget": 128}'
    with engine(random_llama(), offer) as planned:

        def ask(which):
            rids = [planned.send(batch[n], 200, lines[n]) for n in which]
            planned.drain()
            return [planned.output(rid) for rid in rids]

        alone = []
        for n in range(4):
            planned.forget()
            alone += ask([n])
        planned.forget()
        assert ask(range(4)) == alone
        assert ask(range(4)) == alone, "nothing of a packed answer was found by another"
    for n, line in enumerate(lines):
        policy = line if n != 2 else "keydiff(budget=4096)"
        assert Plain(random_llama(), policy, 16).agrees(batch[n], alone[n]) == 200


@pytest.mark.parametrize("policy", [KEYS, "keydiff(budget=128)"])
def test_a_request_that_fits_once_it_is_packed_does_not_wait_for_ever(
    engine, random_llama, prompts, policy
):
    """Its prompt, its longest answer and its private slots are more than the pool, together."""
    (prompt,) = prompts(300)
    with engine(random_llama(), policy) as roomy:
        expected = roomy.generate([prompt], 150)
    with engine(random_llama(), policy, max_total_tokens=512) as planned:
        assert planned.generate([prompt], 150) == expected
        assert planned.counted()["packed_prompts"] == 1
        assert settled(planned, 512)


@pytest.mark.parametrize(
    "policy, at_once",
    [(KEYS, 4), ("streaming_llm(sinks=16, window=128)", 4), ("keydiff(budget=96)", 1)],
)
def test_as_many_run_as_the_pool_holds_of_what_they_will_hold(
    engine, random_llama, prompts, policy, at_once
):
    """Prompts of 100 tokens and answers of 400 are 2,000 for four, in a pool of half as many."""
    batch, options = prompts(100, 97, 103, 110, seed=7), {"schedule_conservativeness": 1.0}
    with engine(random_llama(), policy) as roomy:
        expected = roomy.generate(batch, 400)
    with engine(random_llama(), policy, max_total_tokens=1024, **options) as planned:
        running = []
        planned.steps.append(lambda: running.append(len(planned.scheduler.running_batch.reqs)))
        rids = [planned.send(prompt, 400) for prompt in batch]
        planned.drain()
        assert max(running) == at_once
        assert [planned.output(rid) for rid in rids] == expected
        assert not sum(planned.requests[rid].retraction_count for rid in rids)
        assert settled(planned, 1024)
