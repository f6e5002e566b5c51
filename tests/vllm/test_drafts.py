"""Speculative decoding: drafts change how many steps an answer takes, and nothing else.

The drafter of ``ngram`` knows the answers and is wrong on purpose, so that steps accept all, some
or none of their drafts, before, on and behind the borders of pages. Those with layers of their own
are nearly the model, which reads less than they do.
"""

from __future__ import annotations

import pytest
import torch
import twin

from tests.vllm.drafts import Oracle, speculative, verified
from tests.vllm.test_eviction import add
from tests.vllm.test_lifecycle import preemptions
from tests.vllm.test_selection import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), pytest.mark.both]

OPTIONS = {"max_model_len": 1024, "num_gpu_blocks_override": 220, "max_num_batched_tokens": 256}
ONLY_CPU = pytest.mark.skipif(bool(twin.MODE), reason="others say as much there")


@pytest.fixture
def oracle(monkeypatch) -> Oracle:
    drafter = Oracle()
    drafter.install(monkeypatch)
    return drafter


def later(engine, first, answers, tokens):
    """A turn over the prefix cache, and a prompt whose last token alone is new there, which the
    engine pads with drafts of nothing. -> prompts, answers, prompts packed in each layer"""
    before = [impl.packed_prompts for impl in engine.impls]
    again = [prompt + answer + first[1] for prompt, answer in zip(first, answers, strict=True)][:3]
    said = engine.generate(again, tokens)
    again.append(first[0][:225])
    said += engine.generate(again[3:], tokens)
    counts = [impl.packed_prompts for impl in engine.impls]
    return again, said, [now - then for now, then in zip(counts, before, strict=True)]


def full_pages(engine, request):
    """Blocks of a request that hold nothing but accepted tokens, all that they have room for."""
    manager, *_ = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    held = getattr(manager, "held", {}).get(request.request_id)
    private, prompt = held.course.private if held else 0, request.num_prompt_tokens
    for column, block in enumerate(manager.req_to_blocks[request.request_id]):
        behind = private if column >= -(-prompt // 32) + private else 0
        inside = private and -(-prompt // 32) <= column < -(-prompt // 32) + private
        last = prompt if inside else (column - behind + 1) * 32 - 1
        if not block.is_null and last < request.num_computed_tokens:
            yield block.block_id


def check_digests(engine) -> int:
    """Pages of accepted tokens: whoever wrote them, drafts before them or not, their digests are
    those of the keys that lie in them."""
    if not engine.impls[0].digest:
        return 0
    pages = sorted({page for r in engine.scheduler.running for page in full_pages(engine, r)})
    blocks = torch.tensor(pages, dtype=torch.int64)
    for layer in engine.layers.values() if pages else ():
        impl, cache = layer.impl, layer.kv_cache
        keys, _ = impl.read_pages(layer, cache, blocks[:, None])  # [n, S, H, D]
        tail = impl.views(layer, cache).tail
        wanted = torch.zeros_like(tail)
        slots = (blocks[:, None] * 32 + torch.arange(32)).flatten()
        impl.digest.update(wanted, keys.flatten(0, 1), slots, impl.views(layer, cache).keys)
        assert torch.equal(*(each[blocks].view(torch.int32) for each in (tail, wanted)))
    return len(pages)


def check_drafter(engine) -> None:
    """What a policy frees or packs is the model's: a drafter's layers have the cache that vLLM
    gives them, and all of a request's blocks."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.utils import customize_attention_spec

    drafts = {name: each for name, each in engine.all_layers.items() if name not in engine.layers}
    for layer in drafts.values():
        spec = layer.get_kv_cache_spec(engine.config)
        assert type(customize_attention_spec(layer.get_attn_backend(), spec)) is FullAttentionSpec
        assert not getattr(layer.impl, "planned", False)
    manager = engine.scheduler.kv_cache_manager
    for group, of in zip(
        manager.kv_cache_config.kv_cache_groups, manager.coordinator.single_type_managers,
        strict=True,
    ):  # fmt: skip
        for request in engine.scheduler.running if drafts.keys() & set(group.layer_names) else ():
            row = of.req_to_blocks[request.request_id]
            assert len(row) * 32 >= request.num_computed_tokens
            assert not any(block.is_null for block in row)


WHOLE = {"disable_eagle_block_drop": True}
"""EAGLE else computes a turn's last cached block anew, in which an answer may lie: a prompt's
queries read all, those of an answer what was selected for them."""


@pytest.mark.parametrize(
    "policy, methods",
    [
        ("twilight(budget=0.15, top_p=0.9, dense_layers=0)", ["ngram", "draft_model"]),
        (
            "streaming_llm(sinks=40, window=150) + quest(budget=96, dense_layers=1)",
            ["ngram", "draft_model", "eagle"],
        ),
        pytest.param("snapkv(budget=128)", ["ngram", "draft_model", "eagle"], marks=ONLY_CPU),
        (
            "pyramid(snapkv(budget=128, window=32), beta=4)",
            ["draft_model"] if twin.MODE else ["ngram"],
        ),
        (
            "keydiff(budget=160) + quest(budget=96, dense_layers=0)",
            ["ngram"] if twin.MODE else ["ngram", "draft_model"],
        ),
    ],
)
def test_drafts_change_no_answer(engine, random_llama, prompts, oracle, tmp_path, policy, methods):
    model, first, tokens = random_llama(), prompts(300, 33, 500, 1, 257), 40
    with engine(model, {"policy": policy}, **OPTIONS) as plain:
        answers = plain.generate(first, tokens)
        expected = later(plain, first, answers, tokens)
    oracle.knows(first, answers)
    oracle.knows(*expected[:2])
    for method in methods:
        more = WHOLE if method == "eagle" and "quest" in policy else {}
        drafts = {
            "speculative_config": speculative(method, model, tmp_path / method, **more),
            "async_scheduling": False,
        }
        with engine(model, {"policy": policy}, **OPTIONS, **drafts) as planned:
            planned.poison(freed=False)
            free = planned.free_blocks
            assert pressed(planned, first, tokens) == answers
            assert later(planned, first, answers, tokens) == expected
            accepted, rejected = verified(planned)
            assert accepted > (150 if method == "ngram" else 60)
            assert rejected > 100
            assert planned.free_blocks == free


def pressed(engine, batch, tokens) -> list[list[int]]:
    """Answers of requests that run together until the pool has nothing left for one of them."""
    core, seen, hostages, found = engine.llm.llm_engine, preemptions(engine), [], {}
    checked = 0
    for index, prompt in enumerate(batch):
        add(engine, f"r{index}", prompt, tokens)
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        decoding = [r for r in engine.scheduler.running if r.num_output_tokens > 8]
        if not seen and not hostages and len(decoding) == len(batch):
            hostages = engine.pool.get_new_blocks(engine.free_blocks)
        elif seen and hostages:
            engine.pool.free_blocks(hostages)
            hostages = []
        checked += check_digests(engine)
        check_drafter(engine)
    assert seen, "the pool was meant to be too small"
    assert checked or not engine.impls[0].digest
    return [found[f"r{index}"] for index in range(len(batch))]


UNIT = {"quest": 32, "twilight": 1}
"""Tokens that are chosen as one, of blocks of 128."""


class Asked:
    """Decode queries of an engine's steps and the tokens behind them, by what it schedules and by
    what is counted."""

    def __init__(self, engine, monkeypatch) -> None:
        from kvplug_vllm.metrics import Metrics

        self.queries = self.cached = 0
        self.counted = []
        schedule = engine.scheduler.schedule

        def scheduled(*args, **kwargs):
            output = schedule(*args, **kwargs)
            for name, queries in output.num_scheduled_tokens.items():
                request = engine.scheduler.requests[name]
                last = request.num_computed_tokens  # the step's included
                decoded = range(max(last - queries, request.num_prompt_tokens), last)
                self.queries += len(decoded)
                self.cached += sum(position + 1 for position in decoded)
            return output

        monkeypatch.setattr(engine.scheduler, "schedule", scheduled)
        count = Metrics.count

        def counted(metrics, reads, settings):
            self.counted.append(reads)
            count(metrics, reads, settings)

        monkeypatch.setattr(Metrics, "count", counted)


@pytest.mark.parametrize(
    "policy, method",
    [
        pytest.param("dense", "ngram", marks=ONLY_CPU),
        ("quest(budget=96, dense_layers=0)", "ngram"),
        ("quest(budget=96, dense_layers=0)", "draft_model"),
        ("twilight(budget=0.3, dense_layers=0)", "ngram"),
    ],
)
def test_each_draft_selects_and_is_counted_like_a_decode_step(
    engine, random_llama, prompts, monkeypatch, oracle, tmp_path, policy, method
):
    model = random_llama()
    batch, options = prompts(250, 33, 420), {"max_model_len": 512, "block_size": 128}
    with engine(model, {"policy": policy}, **options) as plain:
        expected = plain.generate(batch, 14)
    oracle.knows(batch, expected)
    shadow = Shadow(monkeypatch)
    drafts = {
        "speculative_config": speculative(method, model, tmp_path / method),
        "async_scheduling": False,
    }
    with engine(model, {"policy": policy}, **drafts, **options) as planned:
        asked = Asked(planned, monkeypatch)
        assert planned.generate(batch, 14) == expected
        assert all(verified(planned))
        selected = planned.selected[0]
    assert sum(reads.queries for reads in asked.counted) == asked.queries > 3 * 13
    assert sum(reads.cached for reads in asked.counted) == asked.cached
    if policy == "dense":
        assert sum(reads.read for reads in asked.counted) == asked.cached
        return
    assert shadow.spared
    assert shadow.checked == 2 * 2 * selected > 2 * 2 * 26, "layers, KV heads"
    spared = asked.cached - sum(reads.read for reads in asked.counted)
    assert spared == UNIT[policy.split("(")[0]] * shadow.spared / (2 * 2)
