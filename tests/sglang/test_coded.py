"""Pages kept in a format: answers are those of a plain Llama that reads what the format says.

Page size 32, chunks of 96 tokens. Codes of every page and what lies in every open page are filled
with garbage when their owner leaves, so that nothing stale can be read unnoticed.
"""

from __future__ import annotations

import pytest

from kvplug import parse
from tests.plain_llama import Coded

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32
OPTIONS = {"page_size": S, "chunked_prefill_size": 96, "max_running_requests": 8}
POISON = 0xFF
"""A byte of NaN in every dtype, and of the highest codes."""


@pytest.fixture(scope="module")
def agreed(random_llama):
    """Tokens of each answer before the first that the plain model would not have said."""

    def count(policy, prompts, answers):
        plain = Coded(random_llama(), policy, S)
        return [plain.agrees(*each) for each in zip(prompts, answers, strict=True)]

    return count


def poison(planned, monkeypatch):
    """What leaves a request becomes garbage: slots that return to the allocator, and rows."""
    backend, allocator = planned.backend, planned.allocator
    rows = planned.scheduler.req_to_token_pool
    backend.token_to_kv_pool.codes.fill_(POISON)
    backend.open.fill_(float("nan"))
    free_rows, free = rows.free_rows, allocator.free

    def without_rows(indices):
        backend.open[:, list(indices)] = float("nan")
        free_rows(indices)

    def without(slots):
        backend.token_to_kv_pool.codes[:, slots.long() // S] = POISON
        free(slots)

    monkeypatch.setattr(rows, "free_rows", without_rows)
    monkeypatch.setattr(allocator, "free", without)


def settled(planned, slots=16384):
    """Nothing is held any more, in the tree or by a request."""
    from kvplug_sglang.settings import Engine

    return sum(planned.free) == slots and not Engine.serving().router.tenants


def test_ragged_chunks_found_again_and_aborted(
    engine, random_llama, prompts, agreed, monkeypatch
):
    policy, batch = "kivi(bits=4)", prompts(300, 65, 33, 31, 64, 1)
    with engine(random_llama(), policy, **OPTIONS) as planned:
        poison(planned, monkeypatch)
        answers = planned.generate(batch, 40)
        assert agreed(policy, batch, answers) == [40] * len(batch)
        assert agreed("kivi(bits=2)", batch, answers) != [40] * len(batch), "any bits would do"
        turns = [prompt + answer for prompt, answer in zip(batch, answers, strict=True)]
        rids = [planned.send(turn, 8) for turn in turns]
        planned.drain()
        print([planned.cached(rid) for rid in rids])
        second = [planned.output(rid) for rid in rids]
        assert agreed(policy, turns, second) == [8] * len(batch)
        assert settled(planned)
