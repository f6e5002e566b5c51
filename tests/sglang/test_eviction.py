"""Prompts are packed into private slots beside the radix tree, and every slot is accounted for."""

from __future__ import annotations

import pytest
import torch

from kvplug_kernels.fp8 import FP8, widened
from kvplug_sglang import compat

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCORED = ["snapkv(budget=64, window=16)", "keydiff(budget=100)"]
TOKEN = 2 * 2 * 2 * 64 * 4
"""Bytes: two layers, keys and values, two heads of 64, fp32."""


class Shadow:
    """Keys, values and queries by layer and position as the model made them, to check packing by;
    in a cache of eight bits as that keeps them.

    For one request at a time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvplug_sglang.attention import PlannedAttention

        self.made: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self.packed = 0
        forward, pack = PlannedAttention._forward, PlannedAttention._pack

        def shadow_forward(backend, stock, q, k, v, layer, *more):
            if k is None:  # of a layer that reads another's cache
                return forward(backend, stock, q, k, v, layer, *more)
            heads, kv_heads = layer.tp_q_head_num, layer.tp_k_head_num
            rows = (
                q.view(len(q), heads, -1),
                k.view(len(q), kv_heads, -1),
                v.view(len(q), kv_heads, -1),
            )
            self.made.setdefault(layer.layer_id, []).append([row.clone() for row in rows])
            return forward(backend, stock, q, k, v, layer, *more)

        def shadow_pack(backend, layer, packing):
            pack(backend, layer, packing)
            self.check(backend, layer, packing)

        monkeypatch.setattr(PlannedAttention, "_forward", shadow_forward)
        monkeypatch.setattr(PlannedAttention, "_pack", shadow_pack)

    def check(self, backend, layer, packing):
        """The private slots hold, head by head, what the plain definition keeps."""
        from kvplug import PromptKV, keep_tokens

        made = self.made[layer.layer_id]
        queries, keys, values = (torch.cat([each[i] for each in made]) for i in range(3))
        length, scored, size = len(packing.slots), packing.scored, backend.engine.page_size
        assert len(keys) == length, "the prompt was prefilled from its start"
        pool = backend.token_to_kv_pool
        if pool.dtype in FP8:
            key_scale, value_scale = compat.cache_scales(layer)
            keys, values = (keys / key_scale).to(pool.dtype), (values / value_scale).to(pool.dtype)
        window = None
        if scored.needs_queries:
            window = queries[-scored.window :].unflatten(1, (layer.tp_k_head_num, -1))[None]
        prompt = PromptKV(
            keys=keys[None], values=values[None], queries=window,
            lengths=torch.tensor([length]), scale=compat.logit_scale(layer),
            first_head=layer.layer_id * layer.tp_k_head_num, page_size=size,
        )  # fmt: skip
        keep = len(packing.targets)
        kept = keep_tokens(scored, prompt, torch.tensor([keep]), keep, packing.protect)[0]
        slots = packing.targets
        for stored, cached in zip(pool.get_kv_buffer(layer.layer_id), (keys, values), strict=True):
            for head in range(layer.tp_k_head_num):
                mine = widened(cached)[kept[head], head]
                assert torch.equal(widened(stored)[slots, head], mine)
        self.packed += 1


@pytest.mark.parametrize(
    "policy, heads, kv_heads, head_dim, page_size",
    [
        ("snapkv(budget=128, window=40)", 9, 3, 64, 16),
        ("knorm(budget=96)", 4, 2, 64, 1),
        ("keydiff(budget=100)", 8, 1, 32, 16),
        ("random(budget=128, seed=3)", 2, 2, 96, 64),
        ("pyramid(snapkv(budget=128, window=16), beta=8)", 4, 2, 64, 16),
    ],
)
def test_private_slots_hold_what_each_head_keeps(
    engine, random_llama, prompts, monkeypatch, policy, heads, kv_heads, head_dim, page_size
):
    shadow = Shadow(monkeypatch)
    model = random_llama(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    with engine(model, policy, page_size=page_size) as planned:
        for prompt in prompts(700, 257, 199, seed=5):
            planned.forget()
            shadow.made.clear()
            planned.generate([prompt], 4)
    assert shadow.packed == 3 * 2, "three prompts, two layers"


@pytest.mark.parametrize("policy", SCORED)
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_next_turn_hits_the_whole_prompt_and_answers_as_if_fresh(
    engine, random_llama, prompts, policy, page_size
):
    first, more = prompts(900, 70, seed=1)
    with engine(random_llama(), policy, page_size=page_size) as planned:
        [answer] = planned.generate([first], 24)
        turn = first + answer + more
        rid = planned.send(turn, 24)
        planned.drain()
        whole = len(first) // page_size * page_size
        assert planned.cached(rid) == whole, "the answer was decoded behind a compressed prompt"
        again = planned.send(first, 24)
        planned.drain()
        window = 16 if "snapkv" in policy else 1
        assert planned.cached(again) == (len(first) - window) // page_size * page_size
        assert planned.output(again) == answer
        planned.forget()
        assert planned.generate([turn], 24) == [planned.output(rid)]


def running_at_once(planned, batch, tokens):
    most = 0

    def look():
        nonlocal most
        most = max(most, len(planned.scheduler.running_batch.reqs))

    planned.steps.append(look)
    planned.generate(batch, tokens)
    return most


def test_three_times_as_many_requests_decode_at_once(engine, random_llama, prompts):
    batch = prompts(*[2100] * 17, seed=2)
    fixed = {
        "max_total_tokens": 12288,
        "max_running_requests": 24,
        "chunked_prefill_size": 1024,
    }
    with engine(random_llama(), **fixed) as stock:
        dense = running_at_once(stock, batch[:8], 32)
    assert dense < 8, "more would not fit"
    with engine(random_llama(), "snapkv(budget=512)", **fixed) as planned:
        compressed = running_at_once(planned, batch, 32)
        counted = planned.counted()
        assert counted["returned_blocks"] == 17 * (2100 // 16)
        assert counted["saved_bytes"] == 17 * (2100 // 16 - 512 // 16) * 16 * TOKEN
    assert compressed >= 3 * dense > 0, f"{compressed} at once, {dense} dense"


@pytest.mark.parametrize("overlap", [True, False])
def test_slots_of_a_request_that_ends_before_the_swap_are_freed(
    engine, random_llama, prompts, overlap
):
    """One token and done: the request finishes where its prompt does. And one aborted there."""
    batch = prompts(500, 333, 900, seed=3)
    with engine(random_llama(), SCORED[0], disable_overlap_schedule=not overlap) as planned:
        from kvplug_sglang import packing
        from kvplug_sglang.settings import Engine

        freed = {}
        free = planned.allocator.free

        def note(slots):
            freed[int(slots[0])] = len(slots)  # again at the end of a group of frees
            free(slots)

        planned.allocator.free = note
        planned.generate(batch[:2], 1)
        assert list(freed.values()) == [64, 64], "their private slots, never swapped in"

        rid = planned.send(batch[2], 40)
        seen = []

        def abort_once_admitted():
            tenant = Engine.serving().router.tenants.get(rid)
            if tenant is not None and not seen:
                seen.append(tenant.slots is not None and not tenant.swapped)
                planned.abort(rid)

        planned.steps.append(abort_once_admitted)
        planned.drain()
        assert seen == [True]
        assert len(planned.output(rid)) < 40
        assert sum(planned.free) == 16384
        assert not Engine.serving().router.tenants
        assert packing.private_tokens(planned.requests[rid]) == 64


@pytest.mark.parametrize("policy", [SCORED[0], f"{SCORED[1]} + quest(budget=48, dense_layers=0)"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_retracted_request_is_compressed_again_and_goes_on_as_it_was(
    engine, random_llama, prompts, policy, page_size
):
    batch = prompts(371, 204, 143, 388, 256, 300, 271, 119, 340, 224, seed=4)
    small = {"max_total_tokens": 1536, "schedule_conservativeness": 0.05, "page_size": page_size}
    with engine(random_llama(), policy, page_size=page_size) as roomy:
        undisturbed = roomy.generate(batch, 120, ignore_eos=False)
    with engine(random_llama(), policy, **small) as planned:
        rids = [planned.send(prompt, 120, ignore_eos=False) for prompt in batch]
        planned.drain()
        retracted = [planned.requests[rid].retraction_count for rid in rids]
        assert sum(retracted), "the pool was too small for all of them"
        assert [planned.output(rid) for rid in rids] == undisturbed
        assert sum(planned.free) == 1536


def test_a_prompt_that_finds_no_room_is_served_whole_and_counted(engine, random_llama, prompts):
    [prompt] = prompts(600, seed=6)
    with engine(random_llama()) as stock:
        expected = stock.generate([prompt], 12)
    with engine(random_llama(), "snapkv(budget=64, window=16)") as planned:
        from prometheus_client import REGISTRY

        before = REGISTRY.get_sample_value("kvplug_whole_prompts_total")
        plain = planned.allocator.alloc
        planned.allocator.alloc = lambda n: None if n == 64 else plain(n)
        assert planned.generate([prompt], 12) == expected
        assert REGISTRY.get_sample_value("kvplug_whole_prompts_total") == before + 1
        assert sum(planned.free) == 16384
