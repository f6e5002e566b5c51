"""vLLM's own fp8 caches under every policy: as the stock engine over the same cache, and below its
budget as the plain definitions over the numbers that such a cache keeps (``as_cached``)."""

from __future__ import annotations

import contextlib

import cpu_eight_bits
import pytest
import twin

from tests.vllm import test_eviction, test_selection
from tests.vllm.test_lifecycle import ROOMY, leave, preemptions, with_room

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CACHES = ["fp8"] if twin.MODE not in ("", "v2") else ["fp8_e4m3", "fp8_e5m2"]
FULL = [
    "quest(budget=4096, dense_layers=0)",
    "twilight(budget=1.0, dense_layers=0)",
    "streaming_llm(sinks=4, window=4096)",
    "snapkv(budget=4096) + twilight(budget=4096, dense_layers=0)",
    "pyramid(keydiff(budget=4096), beta=1.2)",
]
OPTIONS = {"max_model_len": 1024}
SCALES = {"_q_scale": 0.5, "_k_scale": 0.3, "_v_scale": 1.7}


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    if twin.MODE in ("", "v2"):
        cpu_eight_bits.install(monkeypatch)


@pytest.fixture(scope="module")
def stock(engine, random_llama, prompts):
    """Two turns and what the stock engine says in them, once for each cache."""
    answers = {}

    def of(cache):
        if cache not in answers:
            first = prompts(500, 300, 33, 1)
            turns = first, [prompt + first[2] for prompt in first]
            with engine(random_llama(), kv_cache_dtype=cache, **OPTIONS) as plain:
                answers[cache] = turns, [plain.generate(turn, 10) for turn in turns]
        return answers[cache]

    return of


@pytest.mark.both
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("policy", FULL)
def test_full_budget_equals_stock(engine, stock, random_llama, cache, policy):
    turns, expected = stock(cache)
    options = {"kv_cache_dtype": cache, **OPTIONS}
    with engine(random_llama(), {"policy": policy, "shortcut": False}, **options) as planned:
        assert [planned.generate(turn, 10) for turn in turns] == expected
        if "budget" in policy:
            chosen, packed = sum(planned.selected), sum(i.packed_prompts for i in planned.impls)
            assert chosen or packed, "nothing took a way of ours"


def attending(engine):
    """Layers of attention: others may be in the engine's list."""
    return [layer for layer in engine.layers.values() if hasattr(layer, "_k_scale")]


@contextlib.contextmanager
def started(engine, model, policy, scales, **options):
    """An engine whose layers have a checkpoint's scales, which random models have none of: eager,
    for no engine's scales change behind a capture."""
    graphs = twin.MODE.startswith("graphs") and scales
    with contextlib.ExitStack() as stack:
        if graphs:
            from cuda_path import eagerly

            stack.enter_context(eagerly())
        planned = stack.enter_context(engine(model, {"policy": policy}, **options))
        for layer in attending(planned):
            for name, scale in scales.items():
                getattr(layer, name).fill_(scale)
                setattr(layer, f"{name}_float", scale)
        yield planned


@pytest.mark.both
@pytest.mark.parametrize("cache", CACHES)
def test_what_is_chosen_and_read_is_the_definition(
    engine, random_llama, prompts, monkeypatch, cache
):
    """In chunks of a prompt, over a prefix that was cached, by one scale and by others."""
    shadow = test_selection.Shadow(monkeypatch)
    batch = prompts(700, 300, 33, 1)
    again = [prompt + batch[2] for prompt in batch]
    model, options = random_llama(heads=4, kv_heads=2), {"kv_cache_dtype": cache, **OPTIONS}
    for policy, scales in (
        ("quest(budget=128, top_p=0.9, dense_layers=0)", {}),
        ("quest(budget=128, top_p=0.9, dense_layers=0)", SCALES),
        ("twilight(budget=0.2, bits=4, dense_layers=0)", {}),
        ("twilight(budget=0.2, candidates=0.5, dense_layers=0)", SCALES),
    ):
        checked = shadow.checked, shadow.spared
        with started(engine, model, policy, scales, **options) as planned:
            planned.generate(batch, 6)
            hits = planned.run(again, 6)
            assert hits[0].num_cached_tokens >= 700 // 32 * 32
        assert shadow.checked > checked[0]
        assert shadow.spared > checked[1]


@pytest.mark.both
@pytest.mark.parametrize("cache", CACHES)
def test_what_is_kept_is_the_definition(engine, random_llama, prompts, monkeypatch, cache):
    shadow = test_eviction.Shadow(monkeypatch)
    batch = prompts(500, 299, 33, 1)
    options = {"kv_cache_dtype": cache, **OPTIONS}
    for policy, scales in (
        ("snapkv(budget=96, window=40)", SCALES),
        ("knorm(budget=128)", SCALES),
        ("random(budget=96)", {}),
        ("pyramid(keydiff(budget=96))", {}),
    ):
        packed, attended = shadow.packed, shadow.attended
        with started(engine, random_llama(), policy, scales, **options) as planned:
            planned.generate(batch, 4)
        assert shadow.packed == packed + 2 * 2, "two prompts longer than the budget, two layers"
        assert shadow.attended > attended


@pytest.mark.skipif(twin.MODE in ("", "v2"), reason="the plain kernel of CPUs has no sinks")
def test_beside_sinks_our_own_kernel_reads_the_definition(engine, prompts, monkeypatch, tmp_path):
    from kvplug_evals.models.random_gpt_oss import build_random_gpt_oss

    build_random_gpt_oss(tmp_path / "model")
    shadow = test_selection.Shadow(monkeypatch)
    policy, options = "twilight(budget=0.2, dense_layers=0)", {"kv_cache_dtype": CACHES[0]}
    with started(engine, tmp_path / "model", policy, SCALES, **options) as planned:
        planned.generate(prompts(300, 33), 4)
        assert not any(layer.impl.reads_units(1, 32) for layer in attending(planned))
    assert shadow.checked
    assert shadow.spared


def test_preempted_requests_answer_as_alone(engine, random_llama, prompts):
    batch = prompts(224, 256, 240, 231, 97)
    policy = "keydiff(budget=96) + quest(budget=96, dense_layers=0)"
    with engine(
        random_llama(), {"policy": policy}, kv_cache_dtype=CACHES[0],
        num_gpu_blocks_override=ROOMY, max_model_len=512, max_num_batched_tokens=128,
    ) as planned:  # fmt: skip
        planned.poison(freed=False)
        free, expected = planned.free_blocks, with_room(planned, batch, 100)
        hostages, seen = leave(planned, 21), preemptions(planned)
        assert planned.generate(batch, 100) == expected
        assert seen, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free


def test_a_page_is_half_of_bfloat16s_and_its_digests(engine, random_llama):
    from kvplug_vllm.settings import Engine as Served

    heads, size, depth, layers, room = 2, 32, 64, 2, 16 << 20
    options = {"kv_cache_dtype": CACHES[0], "kv_cache_memory_bytes": room, **OPTIONS}
    for policy, rows in (("snapkv(budget=96)", 0), ("twilight(dense_layers=0)", 10)):
        model = random_llama(heads=4, kv_heads=heads, head_dim=depth)
        with engine(model, {"policy": policy}, **options) as planned:
            bfloat16 = 2 * 2 * heads * size * depth
            page = bfloat16 // 2 + rows * heads * depth
            assert planned.config.cache_config.num_gpu_blocks == room // (layers * page)
            (metrics,) = {builder.metrics for builder in planned.builders}
            assert metrics.token * size == layers * bfloat16 // 2
            assert metrics.digest * size == layers * rows * heads * depth
            grown = f"{rows / (2 * size):.1%} larger than vLLM's"
            said = [line for line in Served.current.announced if grown in line]
            assert bool(said) == bool(rows)
