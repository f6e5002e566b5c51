"""Each request by its own policy and budget, in one batch."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OFFER = {
    "policy": "snapkv(budget=64, window=16)",
    "allow": ["quest", "keydiff", "knorm", "random"],
    "max_budget": 128,
}
TOKEN = 2 * 2 * 2 * 64 * 4
"""Bytes of the pool: two layers, keys and values, two heads of 64, fp32."""
PAGE = 16 * TOKEN + 2 * 2 * 2 * 64 * 4
"""And what ``quest`` may be asked to read of a page: its keys' minimum and maximum."""
COMPRESSING = {
    "packed_prompts", "kept_tokens", "dropped_tokens", "packing_seconds", "returned_blocks",
    "saved_bytes",
}  # fmt: skip
COUNTERS = COMPRESSING | {
    "decode_queries", "cached_tokens", "read_tokens", "cached_bytes", "read_bytes",
    "prefill_queries", "prefill_cached_tokens", "prefill_read_tokens",
}  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 16])
def test_mixed_requests_answer_as_alone(engine, random_llama, prompts, page_size):
    base, *rest = prompts(300, 521, 700, 333, 61, 730, 100, seed=8)
    mixed = [
        (rest[0], 12),
        (rest[0], 12),
        (rest[1], 12, {"budget": 32}),
        (base + rest[2], 12, "quest(budget=64, dense_layers=0)"),
        (base + rest[3], 12, "keydiff(budget=128) + quest(budget=48, dense_layers=1)"),
        (rest[4], 12, "dense"),
        (rest[5], 12, {"policy": "random(budget=48)", "min_context": 64, "protect": 8}),
        ([5], 12),
    ]
    with engine(random_llama(), json.dumps(OFFER), page_size=page_size) as server:
        alone = []
        for request in mixed:
            server.forget()
            rid = server.send(*request)
            server.drain()
            alone.append(server.output(rid))
        server.forget()
        rids = [server.send(*request) for request in mixed]
        server.drain()
        assert [server.output(rid) for rid in rids] == alone
        assert len(set(map(tuple, alone))) == 7, "two are the same request, no others agree"
        assert sum(server.free) == 16384
        shared = server.cached(rids[4])
        assert shared in (0, 300 // page_size * page_size), "uncompressed pages are everyone's"


def test_a_dense_request_beside_compressed_ones_equals_stock(engine, random_llama, prompts):
    batch = prompts(600, 420, seed=9)
    with engine(random_llama()) as stock:
        expected = stock.generate(batch, 12)
    with engine(random_llama(), json.dumps(OFFER)) as server:
        nothing = server.counted()
        assert set(nothing) == COUNTERS
        assert not any(nothing.values()), "a rate needs to have seen the zero"
        server.generate(batch, 12)
        compressed = server.counted()
        assert server.generate(batch, 12, "dense") == expected
        assert server.counted() == compressed
        dense = server.counted("dense")
        assert dense["decode_queries"] == 2 * 11
        assert not any(dense.get(counter) for counter in COMPRESSING)
        server.generate(batch[:1], 12)
        again = server.counted()

    assert compressed["prefill_queries"] == 600 + 420
    seen = 600 * 601 // 2 + 420 * 421 // 2
    assert compressed["prefill_cached_tokens"] == compressed["prefill_read_tokens"] == seen
    assert compressed["packing_seconds"] > 0
    assert again["packing_seconds"] > compressed["packing_seconds"]
    whole = 600 // 16, 420 // 16
    assert compressed["packed_prompts"] == 2
    assert compressed["kept_tokens"] == 2 * 64 + 600 % 16 + 420 % 16
    assert compressed["dropped_tokens"] == sum(whole) * 16 - 2 * 64
    assert compressed["returned_blocks"] == sum(whole)
    assert compressed["saved_bytes"] == (sum(whole) - 2 * 64 // 16) * PAGE
    assert again["saved_bytes"] - compressed["saved_bytes"] == (whole[0] - 64 // 16) * PAGE


@pytest.mark.parametrize(
    "policy",
    [
        "snapkv(budget=64, window=16)",
        "streaming_llm(window=128) + quest(budget=64, dense_layers=0)",
    ],
)
def test_decoding_in_the_steps_of_others_prefill(engine, random_llama, prompts, policy):
    """--enable-mixed-chunk: a request's answer does not depend on what shares its steps."""
    batch = prompts(600, 300, 64, 700, 33, seed=22)
    answers = []
    for mixed in (False, True):
        with engine(random_llama(), policy, enable_mixed_chunk=mixed) as server:
            rids, modes, waiting = [], set(), list(batch)

            def one_by_one(server=server, rids=rids, modes=modes, waiting=waiting):
                scheduler = server.scheduler
                if waiting and len(scheduler.running_batch.reqs) >= len(rids):
                    rids.append(server.send(waiting.pop(0), 30))
                if scheduler.last_batch:
                    modes.add(scheduler.last_batch.forward_mode.is_mixed())

            server.steps.append(one_by_one)
            server.drain()
            assert modes == {False, mixed}
            answers.append([server.output(rid) for rid in rids])
    assert len(answers[0]) == len(batch)
    assert answers[0] == answers[1]


def refused(reason):
    from prometheus_client import REGISTRY

    name = "kvplug_refused_requests_total"
    return REGISTRY.get_sample_value(name, {"reason": reason}) or 0.0


@pytest.mark.parametrize(
    "policy, message, counted",
    [
        ("streaming_llm", "does not allow streaming_llm", "not allowed"),
        ({"budget": 4096}, "at most 128 tokens here", "over max_budget"),
        ({"polcy": "dense"}, "Did you mean 'policy'", "unreadable"),
        ("quest(bugdet=64)", "Did you mean 'budget'", "unreadable"),
        (f"quest(budget=1{'0' * 30})", "budget must be below", "unreadable"),
        ('{"policy": ' + "[" * 9000, "nested too deeply", "unreadable"),
    ],
)
def test_what_a_request_may_not_ask_for_is_refused_alone(
    engine, random_llama, prompts, policy, message, counted
):
    [prompt] = prompts(300, seed=10)
    with engine(random_llama(), json.dumps(OFFER)) as server:
        before = refused(counted)
        [expected] = server.generate([prompt], 8)
        good, bad = server.send(prompt, 8), server.send(prompt, 8, policy)
        server.drain()
        assert server.output(good) == expected
        reason = server.requests[bad].finished_reason.to_json()
        assert reason["type"] == "abort"
        assert message in reason["message"]
        assert refused(counted) == before + 1
        assert sum(server.free) == 16384


def test_beams_are_refused(engine, random_llama, prompts):
    [prompt] = prompts(40, seed=11)
    with engine(random_llama(), "snapkv(budget=64)", page_size=1) as server:
        before = refused("beam search")
        server.send(prompt, 4, beam_width=2)
        server.drain()
        message = server.sent[-1].finished_reasons[0]["message"]
        assert "beam search hands rows of the pool" in message
        assert refused("beam search") == before + 1
        assert sum(server.free) == 16384


def test_sessions_are_refused(engine, random_llama, prompts):
    from sglang.srt.managers.io_struct import OpenSessionReqInput, SessionParams

    [prompt] = prompts(40, seed=12)
    with engine(random_llama(), "snapkv(budget=64)", page_size=1) as server:
        server.scheduler.open_session(
            OpenSessionReqInput(capacity_of_str_len=1000, session_id="talk")
        )
        before = refused("session")
        rid = server.send(prompt, 4, session=SessionParams(id="talk"))
        server.drain()
        assert refused("session") == before + 1
        reason = server.requests[rid].finished_reason.to_json()
        assert reason["type"] == "abort"
        assert "a session hands its row of the pool" in reason["message"]
        assert sum(server.free) == 16384
