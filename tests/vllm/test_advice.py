"""``kvplug plan``'s requests at once are vLLM's own, to a block."""

from __future__ import annotations

import pytest

from kvplug import read_offer
from kvplug.advice.capacity import capacity
from kvplug.advice.model import read_model
from kvplug_evals.models.random_llama import build_random_gemma3
from kvplug_evals.models.random_shared import build_random_gemma4
from tests.vllm.test_streaming import concurrency

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.timeout(900)]

MEMORY, PAGE, LONGEST = 30_000_001, 32, 2048


@pytest.mark.parametrize(
    "policy, kind",
    [
        ("dense", "llama"),
        ("twilight(budget=0.0625)", "llama"),
        ("streaming_llm(sinks=32, window=480)", "llama"),
        ("snapkv(budget=512) + quest(budget=256)", "llama"),
        ("pyramid(snapkv(budget=256))", "llama of four layers"),
        ('local(layers="1::2", window=256)', "llama of four layers"),
        ("quest(budget=256)", "gemma3"),
        ("keydiff(budget=256)", "gemma4"),
        ("kivi(bits=4)", "llama"),
        ("kivi(bits=2) + snapkv(budget=256)", "llama of four layers"),
    ],
)
def test_requests_at_once_are_the_start_up_lines(engine, random_llama, tmp_path, policy, kind):
    model = tmp_path / "model"
    if kind == "gemma3":
        build_random_gemma3(model, layer_types=[*["sliding_attention"] * 5, "full_attention"])
    elif kind == "gemma4":
        build_random_gemma4(model)
    else:
        model = random_llama() if kind == "llama" else random_llama(layers=4)
    options = {"max_model_len": LONGEST, "kv_cache_memory_bytes": MEMORY}
    with engine(model, {"policy": policy}, **options) as planned:
        found = capacity(
            read_model(model),
            read_offer({"policy": policy}, environ={}),
            MEMORY,
            block_size=PAGE,
            prompt=LONGEST - 1,
            tokens=LONGEST,
            in_flight=planned.config.max_in_flight_tokens,
        )
        assert found.exact
        assert found.blocks == planned.config.cache_config.num_gpu_blocks
        assert found.requests == concurrency(planned)
