"""Models that mix attention with recurrent layers: blocks of hundreds of tokens, cut in pages."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.test_eviction import add
from tests.vllm.test_requests import generate
from tests.vllm.test_selection import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

FULL = [None, "quest(budget=4096, dense_layers=0)", "snapkv(budget=4096)"]
SMALL = [
    "quest(budget=128, dense_layers=0)",
    "snapkv(budget=256)",
    "random(budget=256) + quest(budget=96, dense_layers=0)",
]
OFFER = {"policy": "dense", "allow": ["quest", "snapkv", "random"], "max_budget": 4096}
APART = [
    {"policy": "twilight(budget=1.0, dense_layers=0)", "shortcut": False},
    {"policy": "snapkv(budget=4096) + twilight(budget=1.0, dense_layers=0)", "shortcut": False},
    {"policy": "streaming_llm(sinks=4, window=4096)", "shortcut": False},
]
"""What no request may choose, with everything going through it."""
BLOCK = {"block_size": None}
"""The model's own, of hundreds of tokens."""
LENGTHS = 700, 330, 33, 1


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("granite4", marks=pytest.mark.both),
        pytest.param("falcon_h1", marks=pytest.mark.cpu),
    ],
)
def hybrid(request, tmp_path_factory):
    from kvplug_evals.models import random_hybrid

    folder = tmp_path_factory.mktemp("model") / request.param
    getattr(random_hybrid, f"build_random_{request.param}")(folder)
    return folder


def test_policies_answer_as_stock_at_full_budget_and_in_a_batch_as_alone(engine, hybrid, prompts):
    batch = prompts(*LENGTHS)
    with engine(hybrid, **BLOCK) as stock:
        assert stock.config.cache_config.block_size > 64
        expected = stock.generate(batch, 8)
    for kvplug in APART:
        with engine(hybrid, kvplug, **BLOCK) as planned:
            assert planned.generate(batch, 8) == expected
    with engine(hybrid, OFFER, **BLOCK) as planned:
        asked = [(prompt, line) for line in (*FULL, *SMALL) for prompt in batch]
        together = generate(planned, asked, 8)
        for n in range(len(FULL)):
            assert together[n * len(batch) :][: len(batch)] == expected
        small = together[len(FULL) * len(batch) :]
        alone = [generate(planned, [one], 8)[0] for one in asked[len(FULL) * len(batch) :]]
        assert small == alone
        assert sum(one != two for one, two in zip(small, expected * len(SMALL), strict=True)) > 0


@pytest.mark.parametrize("policy", ["quest(budget=96, ", "twilight(budget=0.2, "])
def test_selection_is_the_definition_at_each_attention_layer(
    engine, hybrid, prompts, monkeypatch, policy
):
    shadow = Shadow(monkeypatch)
    with engine(hybrid, {"policy": f"{policy}dense_layers=0)"}, **BLOCK) as planned:
        planned.generate(prompts(700, 330, 33), 6)
    assert len(shadow.keys) == 2, "layers that attend"
    assert shadow.checked
    assert shadow.spared


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


@pytest.mark.cpu
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


@pytest.mark.cpu
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
