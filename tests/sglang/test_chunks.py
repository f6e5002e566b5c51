"""Prompts that are packed as they come: against a plain Llama that packs at the same positions."""

from __future__ import annotations

import pytest

from tests.plain_llama import Plain
from tests.sglang.test_answers import settled

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KEYS = "keydiff(budget=96, chunk=64)"
LOTS = "random(budget=64, chunk=128)"


@pytest.mark.parametrize(
    "policy, page_size, overlap", [(KEYS, 16, True), (KEYS, 1, False), (LOTS, 16, True)]
)
def test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions(
    engine, random_llama, prompts, policy, page_size, overlap
):
    """Chunks of 256 tokens, shared by the requests: none, one or several events in each."""
    model = random_llama(layers=3)
    batch = prompts(300, 97, 512, 700, 160)
    with engine(
        model, policy, page_size=page_size, disable_overlap_schedule=not overlap
    ) as planned:
        held = []
        answers = planned.generate(batch, 60)
        assert settled(planned, 16384)
        planned.forget()
        planned.steps.append(lambda: held.append(16384 - sum(planned.free)))
        assert planned.generate(batch[3:4], 60) == answers[3:4]
        assert max(held) < 700, "a prompt is never whole in the pool"
        again = planned.send(batch[2], 60)
        planned.drain()
        assert planned.output(again) == answers[2]
        assert settled(planned, 16384)
        assert planned.backend.packed_prompts == 4 + 2
    plain = Plain(model, policy, page_size)
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [60] * 5


def test_requests_retracted_and_chosen_apart_are_packed_as_before(
    engine, random_llama, prompts, monkeypatch
):
    """By SGLang's own switch for tests, beside requests of other policies."""
    batch = prompts(40, 333, 97, 230, 150, seed=4)
    lines = [
        KEYS,
        KEYS,
        "dense",
        f"{KEYS} + quest(budget=96, dense_layers=0)",
        "keydiff(budget=96)",
    ]
    offer = '{"policy": "dense", "allow": ["keydiff", "quest"], "max_budget": 128}'
    with engine(random_llama(), offer) as planned:
        import sglang.srt.managers.scheduler as scheduling

        def ask(which):
            rids = [planned.send(batch[n], 150, lines[n]) for n in which]
            planned.drain()
            return [planned.output(rid) for rid in rids]

        alone = []
        for n in range(5):
            planned.forget()
            alone += ask([n])
        planned.forget()
        monkeypatch.setattr(scheduling, "TEST_RETRACT", True)
        monkeypatch.setattr(scheduling, "TEST_RETRACT_INTERVAL", 53)
        assert ask(range(5)) == alone
        assert sum(each.retraction_count for each in planned.requests.values()) >= 3
        assert ask(range(5)) == alone, "nothing of a packed prompt was found by another"
        assert settled(planned, 16384)
    assert Plain(random_llama(), KEYS, 16).agrees(batch[1], alone[1]) == 150
