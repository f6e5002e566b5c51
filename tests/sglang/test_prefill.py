"""Sparse prefill in SGLang: what a prompt's queries read, whatever its chunks and its prefix."""

from __future__ import annotations

import json

import pytest

from tests.plain_llama import Narrow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

POSITIONAL = [
    "a_shape(sinks=40, window=100, block=32)",
    "tri_shape(sinks=40, window=64, last=20) + quest(budget=4096, dense_layers=0)",
]
FULL = [
    "tri_shape(sinks=40, window=4096) + snapkv(budget=4096)",
    "xattention(threshold=1.0, sinks=32) + quest(budget=4096, dense_layers=0)",
    "block_quest(budget=4096, sinks=32)",
]
BLOCKS = [
    "xattention(threshold=0.7, sinks=32)",
    "block_quest(budget=160, sinks=32) + snapkv(budget=96, window=32)",
    "random_prefill(budget=128, sinks=32) + streaming_llm(sinks=40, window=300)",
]


@pytest.fixture(scope="module")
def dense(engine, random_llama, prompts):
    with engine(random_llama()) as stock:
        return stock.generate(prompts(700, 350, 90, 1), 12)


@pytest.mark.parametrize("policy", POSITIONAL)
def test_a_prompt_by_position_is_a_plain_llama_s(engine, random_llama, prompts, dense, policy):
    model, batch = random_llama(), prompts(700, 350, 90, 1)
    with engine(model, policy) as planned:
        answers = planned.generate(batch, 12)
        assert answers != dense, "less was read"
        planned.forget()
        assert [planned.generate([prompt], 12)[0] for prompt in batch] == answers
    with engine(model, policy, chunked_prefill_size=112) as planned:
        assert planned.generate(batch, 12) == answers
    plain = Narrow(model, policy, 16)
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [12] * 4


@pytest.mark.parametrize("policy", FULL)
def test_everything_chosen_equals_stock(engine, random_llama, prompts, dense, policy):
    batch = prompts(700, 350, 90, 1)
    with engine(random_llama(), json.dumps({"policy": policy, "shortcut": False})) as planned:
        assert planned.generate(batch, 12) == dense
        assert planned.generate(batch, 12) == dense, "over the prefix cache"
        assert bool(planned.backend.selected_blocks) == ("shape" not in policy)


@pytest.mark.parametrize("policy", BLOCKS)
def test_blocks_read_what_vllm_s_do(engine, random_llama, prompts, dense, policy):
    """A batch whose chunks end on the grid of blocks equals each request alone."""
    batch = prompts(448, 512, 480, 97)
    with engine(random_llama(), policy, chunked_prefill_size=2048) as planned:
        together = planned.generate(batch, 12)
        assert planned.backend.selected_blocks
        planned.forget()
        assert [planned.generate([prompt], 12)[0] for prompt in batch] == together
    with engine(random_llama(), policy, chunked_prefill_size=128) as planned:
        assert [planned.generate([prompt], 12)[0] for prompt in batch] == together
