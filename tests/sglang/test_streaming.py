"""Eviction by position: pages return to the pool while their request lives on."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

POLICIES = [
    "streaming_llm(sinks=20, window=130)",
    "streaming_llm(window=200) + quest(budget=64, dense_layers=0)",
]


def poison(planned):
    """NaN for every slot that returns to the pool; -> how many returned, appended to."""
    import torch

    pool = planned.allocator.get_kvcache()
    free, returned = planned.allocator.free, []

    def spoil(slots):
        returned.append(len(slots))
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[slots.long()] = torch.nan
        free(slots)

    planned.allocator.free = spoil
    return returned


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_freed_pages_are_never_read(engine, random_llama, prompts, policy, page_size):
    batch = prompts(900, 333, 64, 1, seed=12)
    with engine(random_llama(), policy, page_size=page_size) as planned:
        alone = [planned.generate([prompt], 40)[0] for prompt in batch]
        planned.forget()
        returned = poison(planned)
        assert planned.generate(batch, 40) == alone
        assert sum(returned) > 900 + 333 - 2 * 300
        assert sum(planned.free) == 16384


def test_what_is_freed_admits_others_before_anyone_ends(engine, random_llama, prompts):
    """Four prompts fill the pool; their first decode steps free most of it."""
    batch = prompts(*[500] * 8, seed=23)
    policy = "streaming_llm(sinks=16, window=112)"
    options = {"max_total_tokens": 2080, "chunked_prefill_size": 512}
    with engine(random_llama(), policy, **options) as planned:
        running = []
        planned.steps.append(lambda: running.append(len(planned.scheduler.running_batch.reqs)))
        together = planned.generate(batch, 60)
        assert max(running) == 8
        assert [planned.generate([prompt], 60)[0] for prompt in batch[:2]] == together[:2]
        assert planned.free == (2080, 0)


def test_a_long_prompt_holds_its_window_and_a_chunk(engine, random_llama, prompts):
    [prompt] = prompts(3000, seed=13)
    with engine(random_llama(), "streaming_llm(sinks=16, window=128)") as planned:
        least = 16384
        held = []

        def look():
            nonlocal least
            least = min(least, planned.free[0])
            held.append(16384 - planned.free[0])

        planned.steps.append(look)
        planned.generate([prompt], 40)
        # The window behind a chunk's first query, two chunks under way with overlap.
        assert 16384 - least <= 16 + 128 + 2 * 256 + 2 * 16
        assert held[-5] <= 16 + 128 + 3 * 16, "decoding holds sinks and window"


def test_what_it_evicts_is_shared_with_nobody(engine, random_llama, prompts):
    [prompt, short] = prompts(600, 90, seed=14)
    with engine(random_llama(), POLICIES[0]) as planned:
        first, again = planned.send(prompt, 8), None
        planned.drain()
        again = planned.send(prompt, 8)
        planned.drain()
        assert planned.cached(again) == 0
        assert planned.output(again) == planned.output(first)
        planned.generate([short], 8)
        again = planned.send(short, 8)
        planned.drain()
        assert planned.cached(again) == 80, "what its window covers is shared as ever"


def test_protected_spans_stay(engine, random_llama, prompts):
    [prompt] = prompts(700, seed=15)
    policy = '{"policy": "streaming_llm(window=128)", "protect": [[300, 340]]}'
    with engine(random_llama(), policy) as planned:
        from kvplug_sglang.settings import Engine

        gone = []

        def look():
            for tenant in Engine.serving().router.tenants.values():
                gone[:] = list(tenant.freed)

        planned.steps.append(look)
        planned.generate([prompt], 8)
        freed = {token for first, last in gone for token in range(first, last)}
        assert freed == {*range(16, 288), *range(352, 576)}
        counted = planned.counted()
        assert counted["returned_blocks"] == len(freed) // 16
        # Two layers, keys and values, two heads of 64, fp32.
        assert counted["saved_bytes"] == len(freed) * 2 * 2 * 2 * 64 * 4
        assert counted["packing_seconds"] == counted["packed_prompts"] == 0
