"""Hundreds of requests that finish, are aborted and retracted, share prefixes and take turns."""

from __future__ import annotations

import json
import random

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

REQUESTS = 320
POOL = 2048
OFFER = {
    "policy": "snapkv(budget=64, window=16)",
    "allow": ["quest", "keydiff", "knorm"],
    "max_budget": 96,
}
CHOICES = [
    None,
    None,
    {"budget": 96},
    "knorm(budget=48)",
    "keydiff(budget=64) + quest(budget=48, dense_layers=0)",
    "quest(budget=64, dense_layers=0)",
    "dense",
]


def conversations(source):
    """Distinct requests: (prompt, tokens, policy). Some begin alike, some are the next turn."""

    def tokens(count):
        return [source.randrange(512) for _ in range(count)]

    shared = [tokens(count) for count in (280, 150, 70)]
    found = []
    for number in range(48):
        start = source.choice([*shared, []])
        if number % 4 == 3:
            start = source.choice(found)[0]  # whose answer would follow; here, what a user adds
        prompt = (start + tokens(source.randrange(1, 200)))[:900]
        length = source.choice([1, source.randrange(2, 24), source.randrange(2, 24), 100])
        found.append((prompt, length, source.choice(CHOICES)))
    return found


def test_answers_and_slots_after_a_soak(engine, random_llama, monkeypatch):
    monkeypatch.setattr(
        "kvplug.batch.REMEMBERED", 2
    )  # the numbers of settings change all the time
    source = random.Random(19)
    distinct = conversations(source)
    options = {
        "max_total_tokens": POOL,
        "max_running_requests": 24,
        "schedule_conservativeness": 0.02,
    }
    with engine(random_llama(), json.dumps(OFFER), **options) as server:
        alone = []
        for prompt, tokens, policy in distinct:
            server.forget()
            alone.append(server.generate([prompt], tokens, policy, ignore_eos=False)[0])
        server.forget()
        server.requests.clear()

        sent: list[tuple[str, int]] = []
        doomed: dict[str, int] = {}
        inserted = server.tree.insert
        private: set[int] = set()

        def insert(parameters):
            """A row with holes would begin with the dummy slot; private slots are nobody's."""
            assert (parameters.value > 0).all()
            assert not private & set(parameters.value.tolist())
            return inserted(parameters)

        server.tree.insert = insert

        def step():
            from kvplug_sglang.settings import Engine

            private.clear()
            for tenant in Engine.serving().router.tenants.values():
                private.update([] if tenant.slots is None else tenant.slots.tolist())
            if len(sent) < REQUESTS and len(server.scheduler.waiting_queue) < 8:
                which = source.randrange(len(distinct))
                prompt, tokens, policy = distinct[which]
                sent.append((server.send(prompt, tokens, policy, ignore_eos=False), which))
                if source.random() < 0.1:
                    doomed[sent[-1][0]] = source.randrange(1, 20)
            for rid in list(doomed):
                doomed[rid] -= 1
                if not doomed[rid]:
                    server.abort(rid)

        server.steps.append(step)
        while len(sent) < REQUESTS:
            server.drain()
        server.drain()

        finished = [(rid, which) for rid, which in sent if rid not in doomed]
        wrong = [which for rid, which in finished if server.output(rid) != alone[which]]
        assert not wrong, f"{len(wrong)} of {len(finished)} answers differ, of {set(wrong)}"
        for rid in doomed:
            whole = alone[dict(sent)[rid]]
            assert server.output(rid) == whole[: len(server.output(rid))]
        retracted = sum(request.retraction_count for request in server.requests.values())
        assert retracted > 0, "the pool was too small"
        assert len(doomed) > 20
        assert sum(server.free) == POOL
        from kvplug_sglang.settings import Engine

        assert not Engine.serving().router.tenants
