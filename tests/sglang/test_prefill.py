"""Sparse prefill in SGLang: what a prompt's queries read, whatever its chunks and its prefix."""

from __future__ import annotations

import json

import pytest

from tests import heads
from tests.plain_llama import Narrow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

POSITIONAL = [
    "a_shape(sinks=40, window=100, block=32)",
    "tri_shape(sinks=40, window=64, last=20) + quest(budget=4096, dense_layers=0)",
]
FULL = [
    "tri_shape(sinks=40, window=4096) + snapkv(budget=4096)",
    "xattention(threshold=1.0, sinks=32) + quest(budget=4096, dense_layers=0)",
    "block_quest(budget=4096, sinks=32) + twilight(budget=4096, dense_layers=0)",
    "minference(vertical=4096, slash=4096)",
    "flexprefill(threshold=1.0, sinks=32, min_budget=4096)",
    "random_prefill(budget=4096, sinks=32)",
]
BLOCKS = [
    "xattention(threshold=0.7, sinks=32)",
    "block_quest(budget=160, sinks=32) + snapkv(budget=96, window=32) + "
    "twilight(budget=64, dense_layers=0)",
    "random_prefill(budget=128, sinks=32) + streaming_llm(sinks=40, window=300)",
    "flexprefill(threshold=0.5, sinks=32, min_budget=64)",
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
    if policy.startswith("flexprefill"):
        return  # each chunk asks its own last queries
    with engine(random_llama(), policy, chunked_prefill_size=128) as planned:
        assert [planned.generate([prompt], 12)[0] for prompt in batch] == together


def test_each_head_reads_by_its_own_pattern(engine, random_llama, prompts, monkeypatch, tmp_path):
    from kvplug_sglang import attention

    watched = heads.Watched(
        monkeypatch, attention, attention.PlannedAttention, "_blocks", lambda layer: layer.layer_id
    )
    with engine(random_llama(), heads.line(tmp_path)) as planned:
        planned.generate(prompts(700, 350), 4)
    assert watched.heads == {(0, 0, heads.B), (0, 1, heads.C), (1, 0, heads.A), (1, 1, heads.B)}


def test_requests_share_pages_with_those_that_read_a_prompt_as_they_do(
    engine, random_llama, prompts
):
    """With the answers that each has alone, also in one batch."""
    offer = {"policy": "dense", "allow": ["a_shape", "xattention", "quest"]}
    (prompt,) = prompts(600)
    narrow, other = "a_shape(sinks=16, window=64)", "a_shape(sinks=16, window=96)"
    blocks = "xattention(threshold=0.6, sinks=32)"
    with engine(random_llama(), json.dumps(offer), chunked_prefill_size=4096) as mixed:
        answers: dict[tuple[str | None, int], list[list[int]]] = {}

        def cached(policy=None, salt=None, min_context=0):
            asked = {"policy": policy, "min_context": min_context} if policy else None
            rid = mixed.send(prompt, 4, asked, salt=salt)
            mixed.drain()
            answers.setdefault((policy, min_context), []).append(mixed.output(rid))
            return mixed.cached(rid)

        assert cached(narrow) == 0
        assert cached() == 0, "a dense request is not served sparse pages"
        whole = cached()
        assert whole == cached("quest(budget=64)") == cached(narrow) > 550
        assert cached(other) == cached(narrow, min_context=300) == 0, "another policy"
        assert cached(f"{narrow} + quest(budget=64)") == whole, "that decodes otherwise"
        assert cached(blocks) == 0
        assert cached(narrow, "mine") == cached(salt="mine") == 0
        assert cached(narrow, "mine") == cached(salt="mine") == whole
        assert cached(salt='[null, "a_shape(sinks=16, block=64, last=0, window=64) from 0"]') == 0
        assert all(len(set(map(tuple, same))) == 1 for same in answers.values())
        assert answers[narrow, 0][0] != answers[None, 0][0]
        mixed.forget()
        each = [mixed.send(prompt, 4, policy) for policy in (narrow, None, other, blocks)]
        mixed.drain()
        assert [mixed.output(rid) for rid in each] == [
            answers[policy, 0][0] for policy in (narrow, None, other, blocks)
        ]
