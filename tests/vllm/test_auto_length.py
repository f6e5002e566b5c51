"""``--max-model-len auto``: what a request needs is asked for at the length that it may have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import estimate_max_model_len
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvplug import read_offer
from kvplug_vllm.packing import PackingSpec
from kvplug_vllm.settings import EvictionSettings
from kvplug_vllm.streaming import EvictingSpec

S = 32
SHAPE = {"block_size": S, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
STOCK = FullAttentionSpec(**SHAPE)


def spec(policy, private=0, **given):
    offer = read_offer({"policy": policy, **given}, environ={})
    settings = EvictionSettings.of(offer)
    if offer.settings.policy.eviction is not None:
        return EvictingSpec(settings=settings, in_flight=256, **SHAPE)
    return PackingSpec(settings=settings, private_blocks=private, **SHAPE)


def fits(spec, blocks, longest=8192) -> int:
    """The greatest length that vLLM serves with so many blocks."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        max_in_flight_tokens=256,
    )
    return estimate_max_model_len(config, {"layer": spec}, blocks * STOCK.page_size_bytes)


@pytest.mark.parametrize("blocks", [1, 2, 17, 31, 100, 104, 120])
def test_a_window_that_is_never_left_costs_what_stock_costs(blocks):
    streaming = spec("streaming_llm(sinks=32, window=3000)")
    whole = fits(STOCK, blocks)
    assert whole == min(blocks * S, 8192)
    leaves = 1 + 95 + 8  # blocks: sinks, a window and a step's tokens, at any place in a block
    assert fits(streaming, blocks) == (whole if blocks < leaves else 8192)


@pytest.mark.parametrize("blocks", [1, 15, 17, 18, 33, 34, 60])
def test_private_blocks_are_set_aside_where_a_prompt_can_have_some(blocks):
    snapkv = spec("snapkv(budget=512)", private=16)
    # A prompt of 17 whole blocks is the first that is packed, into 16 more.
    wanted = min(blocks * S, 17 * S) if blocks < 18 + 16 else (blocks - 16) * S
    assert fits(snapkv, blocks) == wanted


def test_private_blocks_of_any_choice_are_set_aside_where_requests_choose():
    mixed = spec("dense", private=16, allow=["snapkv"], max_budget=512)
    for blocks in (1, 2, 9, 30, 60):
        length = fits(mixed, blocks)
        prompt = (length - 1) // S
        assert -(-length // S) + min(prompt, 16) <= blocks
        assert -(-(length + 1) // S) + min(length // S, 16) > blocks


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(900)
def test_an_engine_fits_itself_to_its_memory(engine, random_llama, prompts):
    model = random_llama()
    policy = {"policy": "streaming_llm(sinks=32, window=3000)", "protect": [[3500, 4000]]}
    length = {"max_model_len": -1, "kv_cache_memory_bytes": 1 << 20}
    with engine(model, policy, **length) as planned:
        most = planned.config.model_config.max_model_len
        assert 32 < most < 3000
        (answer,) = planned.generate(prompts(most - 8), 8)
        assert len(answer) == 8
