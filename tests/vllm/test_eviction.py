"""Prompts are packed, their pages return to the pool, and the next turn still hits the prefix."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
import twin
from recorded import opaque

from tests.vllm import as_cached

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAGE = 32
FULL = [
    "knorm(budget=4096)",
    "snapkv(budget=4096)",
    "random(budget=4096)",
    "vase(budget=4096)",
    "tova(budget=4096, interval=None)",
    "r_kv(budget=4096, interval=None)",
    "chunkkv(lagkv(budget=4096))",
    "snapkv(budget=4096) + twilight(budget=4096, dense_layers=0)",
    "keydiff(budget=4096) + quest(budget=4096, dense_layers=0)",
    "pyramid(snapkv(budget=4096), beta=1.2)",
]


REAL = FULL[-2:]
"""Policies that SmolLM2 answers under too: between them all that can go wrong with its heads."""


def conversation(prompts, model):
    if model.name == "smollm2":
        batch = prompts(300, 230, 96, 33, 1, vocab=40000)
    else:
        batch = prompts(600, 270, 96, 33, 1)
    return batch, [prompt + batch[2] for prompt in batch]


OPTIONS = {"max_model_len": 2048, "kv_cache_memory_bytes": 512 << 20}


@pytest.fixture(scope="module")
def stock(engine, prompts):
    """A conversation with a model and what the stock engine says in it, once each."""
    answers = {}

    def of(model):
        if model not in answers:
            turns = conversation(prompts, model)
            with engine(model, **OPTIONS) as plain:
                answers[model] = turns, [plain.generate(turn, 12) for turn in turns]
        return answers[model]

    return of


@pytest.mark.parametrize(
    "name, policy",
    [("random_llama", policy) for policy in FULL]
    + [pytest.param("smollm2", policy, marks=pytest.mark.cpu) for policy in REAL],
)
def test_full_budget_equals_stock(engine, stock, request, name, policy):
    model = request.getfixturevalue(name)
    model = model() if name == "random_llama" else model
    turns, expected = stock(model)
    with engine(model, {"policy": policy}, **OPTIONS) as planned:
        assert [planned.generate(turn, 12) for turn in turns] == expected
        assert not any(impl.packed_prompts for impl in planned.impls), "nothing to compress"
    with engine(model, {"policy": policy, "shortcut": False}, **OPTIONS) as planned:
        assert planned.generate(turns[0], 12) == expected[0]
        assert {impl.packed_prompts for impl in planned.impls} == {4}, "all but one token's prompt"
        assert planned.generate(turns[1], 12) == expected[1]


class Shadow:
    """Keys, values and queries by layer and slot as the model made them, to check packing by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvplug_vllm import attention, compat

        self.rows: dict[str, dict[int, tuple[torch.Tensor, ...]]] = defaultdict(dict)
        self.asked: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        self.packed = self.attended = 0
        update, pack = attention.PlannedImpl.do_kv_cache_update, attention.PlannedImpl.pack
        forward = attention.PlannedImpl.forward

        check_attention = opaque(self.check_attention)  # replayed with the step it looks at

        @opaque
        def keep(impl, layer, key, value, slot_mapping):
            keys, values = as_cached.keys_and_values(impl, layer, key, value)
            for token, slot in enumerate(slot_mapping.tolist()):
                self.rows[layer.layer_name][slot] = keys[token].clone(), values[token].clone()

        @opaque
        def ask(name, query, slot_mapping):
            for token, slot in enumerate(slot_mapping.tolist()):
                self.asked[name][slot] = query[token].float().clone()

        def shadow_update(impl, layer, key, value, kv_cache, slot_mapping):
            update(impl, layer, key, value, kv_cache, slot_mapping)
            keep(impl, layer, key, value, slot_mapping)

        def shadow_pack(impl, layer, kv_cache, packing):
            pack(impl, layer, kv_cache, packing)
            if twin.MODE:  # copied within the cache, whose pages are plain
                private = packing.slots // kv_cache.shape[2], packing.slots % kv_cache.shape[2]
                packed = impl.as_numbers(kv_cache)[private[0], :, private[1]]
                keep(impl, layer, *packed.chunk(2, -1), packing.slots)
            self.check_packing(impl, layer, kv_cache.shape[2], packing)

        def shadow_forward(impl, layer, query, key, value, cache, metadata, output, **scales):
            if metadata is not None:
                ask(layer.layer_name, query, metadata.slot_mapping)
            forward(impl, layer, query, key, value, cache, metadata, output, **scales)
            plan = getattr(metadata, "kvplug", None)
            if plan is not None:
                reads = plan.phases[-1].layers[compat.layer_index(layer.layer_name)]
                whole = metadata if reads is None else reads.whole.metadata
                check_attention(impl, layer, query, whole, output)
            return output

        monkeypatch.setattr(attention.PlannedImpl, "do_kv_cache_update", shadow_update)
        monkeypatch.setattr(attention.PlannedImpl, "pack", shadow_pack)
        monkeypatch.setattr(attention.PlannedImpl, "forward", shadow_forward)

    def check_packing(self, impl, layer, size, packing):
        """The private slots hold, head by head, what the plain definition keeps."""
        from kvplug import PromptKV, keep_tokens
        from kvplug_vllm import compat

        name = layer.layer_name
        rows, scored = self.rows[name], packing.settings.policy.scored
        scale = as_cached.factors(impl, layer)[0]
        length, keep = packing.event.tokens, packing.width
        natural = [
            int(packing.pages[0, position // size]) * size + position % size
            for position in range(length)
        ]
        keys = torch.stack([rows[slot][0] for slot in natural])
        window = natural[-scored.window :] if scored.needs_queries else []
        queries = None
        if window:
            queries = torch.stack([self.asked[name][slot] for slot in window])
            queries = queries.unflatten(1, (impl.num_kv_heads, -1))[None]
            missing = scored.window - len(window)
            queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, 0, missing, 0))
        solo = PromptKV(
            keys=keys[None],
            values=keys[None],
            queries=queries,
            lengths=torch.tensor([length]),
            scale=scale,
            first_head=compat.first_kv_head(name, impl.num_kv_heads),
            page_size=size,
        )
        kept = keep_tokens(scored, solo, torch.tensor([keep]), keep)[0].tolist()
        for place, slot in enumerate(packing.slots.tolist()):
            packed_key, packed_value = rows[slot]
            for head in range(impl.num_kv_heads):
                key, value = rows[natural[kept[head][place]]]
                assert torch.equal(packed_key[head], key[head])
                assert torch.equal(packed_value[head], value[head])
        self.packed += 1

    def check_attention(self, impl, layer, query, metadata, output):
        """The stock kernel over the rewritten table is plain attention over its tokens."""
        rows, size = self.rows[layer.layer_name], PAGE
        scale, value_scale = as_cached.factors(impl, layer)
        group = impl.num_queries_per_kv
        bounds = metadata.query_start_loc.tolist()
        for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
            length = int(metadata.seq_lens[row])
            if end - begin != 1 or not 1 < length <= 900:
                continue
            slots = [
                int(metadata.block_table[row, position // size]) * size + position % size
                for position in range(length)
            ]
            keys = torch.stack([rows[slot][0] for slot in slots])
            values = torch.stack([rows[slot][1] for slot in slots])
            for head in range(impl.num_kv_heads):
                asked = query[begin, head * group : (head + 1) * group].float()
                mass = (asked @ keys[:, head].T * scale).softmax(-1)
                expected = mass @ values[:, head] * value_scale
                got = output[begin, head * group : (head + 1) * group].float()
                torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)
            self.attended += 1


@pytest.mark.both
@pytest.mark.parametrize(
    "policy, dtype, heads, head_dim",
    [
        ("knorm(budget=128)", "float32", (4, 2), 64),
        ("snapkv(budget=128, window=40)", "float32", (9, 3), 64),
        ("snapkv(budget=96)", "bfloat16", (8, 1), 32),
        ("keydiff(budget=100)", "float16", (2, 2), 96),
        ("random(budget=128, seed=3)", "float32", (4, 2), 80),
        ("pyramid(snapkv(budget=128, window=32))", "float32", (4, 2), 64),
    ],
)
def test_kept_tokens_are_those_of_the_definition(
    engine, random_llama, prompts, monkeypatch, policy, dtype, heads, head_dim
):
    model = random_llama(heads=heads[0], kv_heads=heads[1], head_dim=head_dim)
    shadow = Shadow(monkeypatch)
    batch = prompts(900, 530, 299, 33, 1)
    with engine(model, {"policy": policy}, dtype=dtype) as planned:
        planned.generate(batch, 6)
        planned.generate([batch[0] + batch[3], batch[1]], 6)
    assert shadow.packed == 5 * 2, "five prompts longer than the budget, two layers"
    assert shadow.attended


def held(engine) -> dict[str, int]:
    """Blocks that each live request holds."""
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    return {
        request.split("-")[0]: sum(not block.is_null for block in blocks)
        for request, blocks in manager.req_to_blocks.items()
    }


def add(engine, name, prompt, tokens):
    from vllm import SamplingParams

    engine.llm.llm_engine.add_request(
        name,
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
    )


@pytest.fixture(scope="module")
def together():
    """Requests that decoded together, by policy."""
    return {}


@pytest.mark.cpu
@pytest.mark.parametrize("policy", ["snapkv(budget=256)", "knorm(budget=250)"])
def test_held_blocks_are_nominal_and_three_times_as_many_requests_run(
    engine, random_llama, prompts, together, policy
):
    """A pool that decodes three dense requests of 2,000 tokens decodes nine compressed ones."""
    model, count, blocks, tokens = random_llama(), 10, 210, 120
    options = {"max_model_len": 2176, "num_gpu_blocks_override": blocks, "max_num_seqs": 16}
    batch = prompts(*[1990 + index for index in range(count)])
    for line in ("dense", policy)[len(together) > 0 :]:
        with engine(model, {"policy": line}, **options) as planned:
            for index, prompt in enumerate(batch):
                add(planned, f"r{index}", prompt, tokens)
            core = planned.llm.llm_engine
            most, answers = 0, {}
            while core.has_unfinished_requests():
                for output in core.step():
                    if output.finished:
                        answers[output.request_id] = list(output.outputs[0].token_ids)
                running = planned.scheduler.running
                most = max(most, sum(r.num_output_tokens > 1 for r in running))
                if line == policy:
                    for request in running:
                        if request.num_output_tokens > 3:
                            prompt = request.num_prompt_tokens
                            now = request.num_computed_tokens
                            nominal = 8 + -(-now // PAGE) - prompt // PAGE
                            index = request.request_id.split("-")[0]
                            assert held(planned)[index] in (nominal, nominal + 1)
            together[line] = most
            assert planned.free_blocks == blocks - 1
            if line == policy:
                planned.forget()
                alone = {}
                add(planned, "one", batch[0], 4)
                while core.has_unfinished_requests():
                    core.step()
                    if planned.scheduler.running[:1] and (
                        planned.scheduler.running[0].num_output_tokens == 4 - 1
                    ):
                        usage = planned.scheduler.kv_cache_manager.usage * (blocks - 1)
                        assert round(usage) == 8 + 1, "the engine's own metric"
                planned.forget()
                for index in (0, 4, count - 1):
                    alone[f"r{index}"] = planned.generate([batch[index]], tokens)[0]
                assert all(answers[name] == found for name, found in alone.items())
    assert together[policy] >= 3 * together["dense"], together


@pytest.mark.parametrize("policy", ["snapkv(budget=128, window=64)", "keydiff(budget=128)"])
def test_growing_turns_hit_the_uncompressed_prefix(engine, random_llama, prompts, policy):
    first, *asked = prompts(700, 90, 120)
    with engine(random_llama(), {"policy": policy}) as planned:
        turn, turns = first, []
        for question in [*asked, []]:
            answer = planned.generate([turn], 20)[0]
            turns.append((turn, answer))
            turn = turn + answer + question
        planned.forget()
        shared = 0
        for prompt, answer in turns:
            output = planned.run([prompt], 20)[0]
            assert list(output.outputs[0].token_ids) == answer
            window = 64 if "snapkv" in policy else 1
            most = min(shared, len(prompt) - window) // PAGE * PAGE
            assert output.num_cached_tokens == most, "every full block of the shared prefix"
            shared = len(prompt)  # what was decoded depends on the policy and is not shared


def test_pyramids_layers_free_their_own_pages(engine, random_llama, prompts):
    """Six layers in three groups: 7, 4 and 1 pages of a prompt stay, hits are the maximum."""
    model = random_llama(layers=6)
    line = "pyramid(snapkv(budget=128, window=32))"
    batch = prompts(700, 530, 33)
    with engine(model, {"policy": line}, max_model_len=1024) as planned:
        planned.poison(freed=False)
        free = planned.free_blocks
        groups = planned.scheduler.kv_cache_manager.coordinator.single_type_managers
        assert [manager.spec.budget for manager in groups] == [201, 128, 55]
        expected = []
        for prompt in batch:
            planned.forget()
            expected += planned.generate([prompt], 20)
        planned.forget()
        assert planned.generate(batch, 20) == expected
        again = planned.run(batch, 20)
        assert [list(output.outputs[0].token_ids) for output in again] == expected
        hits = [(len(prompt) - 32) // PAGE * PAGE for prompt in batch]
        assert [output.num_cached_tokens for output in again][:2] == hits[:2]

        add(planned, "r", batch[0], 40)
        core = planned.llm.llm_engine
        while not planned.scheduler.running or (
            planned.scheduler.running[0].num_output_tokens < 5
        ):
            core.step()
        held = [
            sum(not block.is_null for block in next(iter(manager.req_to_blocks.values())))
            for manager in groups
        ]
        decoded = -(-planned.scheduler.running[0].num_computed_tokens // PAGE) - 700 // PAGE
        assert held == [pages + decoded for pages in (7, 4, 2)]
        while core.has_unfinished_requests():
            core.step()
        planned.forget()
        assert planned.free_blocks == free
    with engine(model, max_model_len=1024) as stock:
        dense = stock.generate(batch, 20)
    assert dense[2] == expected[2]
    assert dense[:2] != expected[:2], "the budget was small enough to matter"
