"""What policies leave of the recurrent layers beside those that attend."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.test_eviction import add

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.timeout(900)]

APART = [
    {"policy": "twilight(budget=1.0, dense_layers=0)", "shortcut": False},
    {"policy": "snapkv(budget=4096) + twilight(budget=1.0, dense_layers=0)", "shortcut": False},
    {"policy": "streaming_llm(sinks=4, window=4096)", "shortcut": False},
]
"""With room for all, and everything going through them."""
BLOCK = {"block_size": None}
"""The model's own, of hundreds of tokens."""


@pytest.fixture(scope="module", params=["granite4", "falcon_h1"])
def hybrid(request, tmp_path_factory):
    from kvplug_evals.models import random_hybrid

    folder = tmp_path_factory.mktemp("model") / request.param
    getattr(random_hybrid, f"build_random_{request.param}")(folder)
    return folder


def states(engine, name):
    """Of a request in the recurrent layers, as they stand."""
    managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    found = {}
    for manager, group in zip(managers, groups, strict=True):
        for layer in group.layer_names:
            cache = engine.layers[layer].kv_cache
            if not isinstance(cache, torch.Tensor):
                (block,) = [b for b in manager.req_to_blocks[name] if not b.is_null][-1:]
                found[layer] = [each[block.block_id].clone() for each in cache]
    return found


def test_recurrent_states_are_those_of_stock(engine, hybrid, prompts):
    """Bit for bit where the stock kernel reads; our own for tokens sums in another order."""
    (prompt,) = prompts(700)

    def after(kvplug):
        with engine(hybrid, kvplug, **BLOCK) as planned:
            core = planned.llm.llm_engine
            add(planned, "r", prompt, 8)
            while core.has_unfinished_requests():
                core.step()
                (running,) = planned.scheduler.running or [None]
                if running is not None and running.num_output_tokens == 5:
                    return states(planned, running.request_id)
        raise AssertionError("the request never had five tokens")

    expected = after(None)
    assert expected
    for kvplug in APART:
        got = after(kvplug)
        assert got.keys() == expected.keys()
        for layer, parts in got.items():
            for one, two in zip(parts, expected[layer], strict=True):
                near = 1e-4 if "twilight" in kvplug["policy"] else 0
                torch.testing.assert_close(one, two, rtol=0, atol=near)


def test_blocks_return_to_the_pool(engine, hybrid, prompts):
    (prompt,) = prompts(2000)
    held = {}
    for line in ("dense", "streaming_llm(sinks=4, window=400)", "snapkv(budget=256)"):
        with engine(hybrid, {"policy": line}, **BLOCK) as planned:
            core, free = planned.llm.llm_engine, planned.free_blocks
            add(planned, "r", prompt, 8)
            while core.has_unfinished_requests():
                core.step()
                if any(each.num_output_tokens == 5 for each in planned.scheduler.running):
                    held[line] = free - planned.free_blocks
            assert planned.free_blocks == free
    dense, streaming, snapkv = held.values()
    assert streaming <= dense - 4
    assert snapkv <= dense - 5


def test_a_prefix_is_hit_as_far_as_the_engine_has_it(engine, hybrid, prompts):
    """And the answer over it is a fresh cache's, also where the turn before was compressed."""
    first, options = prompts(1100, 630, 33), {**BLOCK, "enable_prefix_caching": True}

    def turns(planned):
        found, batch = [], first
        for _ in range(2):
            outputs = planned.run(batch, 8)
            answers = [list(each.outputs[0].token_ids) for each in outputs]
            found.append((answers, [each.num_cached_tokens for each in outputs]))
            batch = [a + b + first[2] for a, b in zip(batch, answers, strict=True)]
        return found, batch

    with engine(hybrid, **options) as stock:
        expected, _ = turns(stock)
    assert expected[1][1][:2] == [1024, 512]
    for kvplug in APART:
        with engine(hybrid, kvplug, **options) as planned:
            found, _ = turns(planned)
            assert [answers for answers, _ in found] == [answers for answers, _ in expected]
    for line in ("snapkv(budget=256)", "quest(budget=96, dense_layers=0)"):
        with engine(hybrid, {"policy": line}, **options) as planned:
            found, batch = turns(planned)
            assert found[1][1][:2] == [1024, 512]
            again = planned.generate(batch, 8)
            planned.forget()
            assert again == planned.generate(batch, 8)
