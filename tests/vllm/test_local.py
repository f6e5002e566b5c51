"""Layers that a policy makes local answer, and return blocks, as those that a configuration makes
so: the same weights under stock vLLM with the windows in the configuration say how."""

from __future__ import annotations

import cpu_eight_bits
import pytest
import twin

from kvplug_vllm import metrics
from tests.stand_ins.host_memory import HostMemory
from tests.vllm.drafts import Oracle, speculative, verified
from tests.vllm.test_lifecycle import preemptions, solo
from tests.vllm.test_offloading import CONNECTOR
from tests.vllm.test_streaming import concurrency

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

LAYERS = 4
WINDOW = 100
LOCAL = f'local(layers="1::2", window={WINDOW})'
UNEVEN = f'local(layers="1", window={WINDOW})'
"""Three layers are left, and vLLM puts equally many into a group: three groups of one policy."""
OPTIONS = {"max_model_len": 2048, "max_num_batched_tokens": 128}
BESIDE = [
    "quest(budget=96, dense_layers=0)",
    "snapkv(budget=96) + quest(budget=64, dense_layers=0)",
    pytest.param("streaming_llm(sinks=4, window=200)", marks=pytest.mark.cpu),
    pytest.param("pyramid(snapkv(budget=128, window=32), beta=4)", marks=pytest.mark.cpu),
]
"""With less than there is to read or to keep."""


@pytest.fixture(scope="module")
def model(random_llama):
    return random_llama(layers=LAYERS)


def by_configuration(*layers: int) -> dict:
    """Layers of a Llama see a window. Nothing else of it reads these entries."""
    kinds = ["sliding" if n in layers else "full" for n in range(LAYERS)]
    given = {"layer_types": [f"{kind}_attention" for kind in kinds], "sliding_window": WINDOW}
    return {**OPTIONS, "hf_overrides": given}


def batch(prompts):
    return prompts(430, 330, 97, 1)


def turns(engine, prompts):
    """A ragged batch, in chunks; the next turn, from the prefix cache."""
    first = batch(prompts)
    second = [prompt + first[1][:90] for prompt in first]
    return engine.generate(first, 12), engine.generate(second, 12)


def crowded(engine, prompts):
    """More than the pool has room for: requests are preempted, and go on."""
    hostages = engine.pool.get_new_blocks(engine.free_blocks - 24)
    seen = preemptions(engine)
    answers = engine.generate(prompts(64, 60, 50, 33, seed=1), 90)
    assert seen, "the pool was meant to be too small"
    engine.pool.free_blocks(hostages)
    return answers


def seen_by_layers(engine):
    """Windows as the layers tell the engine, and as the kernel is told."""
    return [(layer.sliding_window, layer.impl.sliding_window) for layer in engine.layers.values()]


def groups(engine):
    """Of layers that share blocks: what the engine's own managers free by."""
    return [
        (type(group.kv_cache_spec).__name__, getattr(group.kv_cache_spec, "sliding_window", None),
         group.kv_cache_spec.block_size, group.layer_names)
        for group in engine.scheduler.kv_cache_config.kv_cache_groups
    ]  # fmt: skip


@pytest.mark.both
def test_local_layers_are_those_of_a_configuration_token_for_token(engine, model, prompts):
    with engine(model, **OPTIONS) as stock:
        everything, room = turns(stock, prompts), concurrency(stock)
    with engine(model, **by_configuration(1, 3)) as stock:
        expected = seen_by_layers(stock), groups(stock), concurrency(stock)
        answers = turns(stock, prompts), crowded(stock, prompts)
    with engine(model, {"policy": LOCAL}, **OPTIONS) as local:
        assert (seen_by_layers(local), groups(local), concurrency(local)) == expected
        assert [impl.planned for impl in local.impls] == [True, False] * 2
        free = local.free_blocks
        assert (turns(local, prompts), crowded(local, prompts)) == answers
        assert concurrency(local) > 1.4 * room, "half of the layers hold a window and a batch"
        local.forget()
        assert local.free_blocks == free
    assert answers[0] != everything, "the window was small enough to matter"


@pytest.fixture
def counted(monkeypatch):
    """What kvplug counts, by counter: of planned layers and their blocks alone."""
    counts: dict[str, float] = {}

    def add(counter, amount, label):
        counts[counter.name] = counts.get(counter.name, 0) + amount

    monkeypatch.setattr(metrics, "add", add)
    return counts


def taken(counts):
    """And begin anew. Seconds are never the same."""
    now = {name: count for name, count in counts.items() if name != metrics.SECONDS.name}
    counts.clear()
    return now


@pytest.mark.parametrize("policy", BESIDE)
def test_the_other_layers_are_planned_as_beside_those_of_a_configuration(
    engine, model, prompts, counted, policy
):
    with engine(model, {"policy": policy}, **by_configuration(1)) as windowed:
        expected = groups(windowed), turns(windowed, prompts)
        selected, counts = windowed.selected, taken(counted)
    with engine(model, {"policy": f"{policy} + {UNEVEN}"}, **OPTIONS) as local:
        assert (groups(local), turns(local, prompts)) == expected
        assert (local.selected, taken(counted)) == (selected, counts)
        alone = []
        for prompt in batch(prompts):
            local.forget()
            alone += local.generate([prompt], 12)
    assert alone == expected[1][0]
    chooses = "quest" in policy
    assert [queries > 0 for queries in selected] == [chooses, False, chooses, chooses]
    assert counts[metrics.QUERIES.name] > 0


def test_what_reads_and_keeps_all_beside_it_changes_nothing(engine, model, prompts):
    with engine(model, {"policy": UNEVEN}, **OPTIONS) as local:
        expected = turns(local, prompts)
    policy = f"{UNEVEN} + snapkv(budget=2048) + quest(budget=4096, dense_layers=0)"
    with engine(model, {"policy": policy, "shortcut": False}, **OPTIONS) as local:
        assert turns(local, prompts) == expected
        assert [n > 0 for n in local.selected] == [True, False, True, True]


QUEST = "quest(budget=96, dense_layers=0)"


@pytest.mark.cpu
def test_local_layers_have_fp8_caches_as_those_of_a_configuration(
    engine, model, prompts, monkeypatch
):
    cpu_eight_bits.install(monkeypatch)
    fp8 = {"kv_cache_dtype": "fp8"}
    with engine(model, {"policy": QUEST}, **by_configuration(1, 3), **fp8) as windowed:
        expected = groups(windowed), turns(windowed, prompts), windowed.selected
    with engine(model, {"policy": f"{QUEST} + {LOCAL}"}, **OPTIONS, **fp8) as local:
        assert (groups(local), turns(local, prompts), local.selected) == expected
        local.forget()
        assert crowded(local, prompts) == solo(local, prompts(64, 60, 50, 33, seed=1), 90)


@pytest.mark.both
def test_local_layers_beside_drafts_and_host_memory_answer_as_without(
    engine, model, prompts, monkeypatch, tmp_path
):
    policy = {"policy": f"{QUEST} + {LOCAL}"}
    with engine(model, policy, **OPTIONS) as plain:
        first, second = expected = turns(plain, prompts)
    oracle = Oracle()
    oracle.install(monkeypatch)
    asked = batch(prompts)
    oracle.knows(asked, first)
    oracle.knows([prompt + asked[1][:90] for prompt in asked], second)
    methods = ["draft_model"] if twin.MODE else ["ngram"]
    for method in methods:
        drafts = speculative(method, model, tmp_path / method)
        options = {"speculative_config": drafts, "async_scheduling": False, **OPTIONS}
        with engine(model, policy, **options) as drafted:
            drafted.poison(freed=False)
            assert turns(drafted, prompts) == expected
            assert all(verified(drafted))
    with engine(model, policy, kv_transfer_config=CONNECTOR, **OPTIONS) as offloaded:
        offloaded.poison(freed=False)
        for round_ in range(2):
            found = offloaded.run(asked, 12)
            assert [list(each.outputs[0].token_ids) for each in found] == first
            assert sum(each.num_cached_tokens for each in found) >= 600 * round_
            offloaded.forget()
        assert HostMemory.worker is not None
        assert HostMemory.worker.moved["loaded"] > 0
