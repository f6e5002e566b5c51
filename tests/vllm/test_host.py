"""Pages that left the pool for host memory in a format of their own, and came back as it has them.

Every new block is filled with garbage when it is handed out, so that what a page does not bring
along cannot go unnoticed.
"""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
import twin

from kvplug_evals.models.random_llama import build_random_gemma3
from kvplug_vllm import host
from tests.vllm.test_offloading import chosen  # noqa: F401

pytestmark = [pytest.mark.engine, pytest.mark.both, pytest.mark.timeout(600)]

S = 32
LENGTHS = (700, 600, 500)
SMALL = {"num_gpu_blocks_override": 36, "max_model_len": 1024}
"""A pool that holds any of those prompts, and no two of them."""
FOUND = [length // S * S for length in LENGTHS]
STORED, LOADED = "vllm:kv_offload_store_bytes", "vllm:kv_offload_load_bytes"


def connector(size: int = 64 << 20, **options: object) -> dict[str, object]:
    named = {"spec_name": "HostPages", "spec_module_path": "kvplug_vllm.host"}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {**named, "cpu_bytes_to_use": size, **options},
    }


@pytest.fixture
def worker(monkeypatch):
    """The last engine's, once it is there."""
    made = []

    def get_worker(self, caches):
        made[:] = [get(self, caches)]
        return made[0]

    get = host.HostPages.get_worker
    monkeypatch.setattr(host.HostPages, "get_worker", get_worker)
    return made


def metric(engine, name: str) -> float:
    return sum(found.value for found in engine.llm.get_metrics() if found.name == name)


def one_by_one(engine, asked, tokens=16) -> tuple[list[list[int]], list[int]]:
    found = [engine.run([prompt], tokens)[0] for prompt in asked]
    return [[*each.outputs[0].token_ids] for each in found], [f.num_cached_tokens for f in found]


def assert_coded(new: torch.Tensor, old: torch.Tensor, over: int, bits: int) -> None:
    """Nearest of equally many numbers from the lowest to the highest of a dimension."""
    lo, hi = old.amin(over, True), old.amax(over, True)
    step = (hi - lo) / (2**bits - 1)
    places = (new - lo) / step
    assert (places - places.round()).abs().max() < 1e-3
    assert ((new - old).abs() / step).max() < 0.501


@pytest.mark.parametrize(
    "policy, format, bits",
    [
        ("dense", "kivi(bits=4)", (4, 4)),
        ("quest(budget=96, dense_layers=0)", "kivi(bits=4)", (4, 4)),
        ("twilight(budget=48, dense_layers=0)", "kivi(bits=8, value_bits=4)", (8, 4)),
        ("twilight(budget=48, dense_layers=0)", "plain", None),
    ],
)
def test_a_prefix_that_was_pushed_out_of_the_pool_comes_back_as_the_format_has_it(
    engine, random_llama, prompts, chosen, worker, policy, format, bits  # noqa: F811
):  # fmt: skip
    asked, transfer = prompts(*LENGTHS), connector(format=format)
    with engine(random_llama(), {"policy": policy}, kv_transfer_config=transfer, **SMALL) as ours:
        ours.poison(freed=False)
        pages, stored, expected, choices = worker[0].pages, [], [], []
        read, pages.read = pages.read, lambda *page: stored.append(page) or read(*page)
        for prompt in asked:
            stored.clear()
            chosen.clear()
            (answer,), cached = one_by_one(ours, [prompt])
            assert cached == [0]
            if bits:
                coded_in_place(ours, pages, read, stored, bits)
                chosen.clear()
                (answer,), cached = one_by_one(ours, [prompt])
                assert cached == [len(prompt) // S * S]
            expected.append(answer)
            choices += chosen
        assert metric(ours, LOADED) == 0
        chosen.clear()
        again, cached = one_by_one(ours, asked)
        assert cached == FOUND
        assert again == expected
        assert chosen == choices
        assert bool(choices) == (policy != "dense" and not twin.MODE.startswith("graphs"))
        moved = sum(FOUND) // S * pages.width(0)
        assert (metric(ours, STORED), metric(ours, LOADED)) == (moved, moved)


def coded_in_place(engine, pages, read, stored, bits) -> None:
    """What would come back, in the place of what went."""
    blocks = torch.cat([blocks for _, blocks in stored])

    def held() -> list[tuple[torch.Tensor, torch.Tensor]]:
        layers = engine.layers.values()
        return [x.impl.read_pages(x, x.kv_cache, blocks[:, None]) for x in layers]

    before = held()
    pages.write(0, blocks, read(0, blocks))
    groups = (-1, pages.layouts[0].group)
    for (keys, values), (old_keys, old_values) in zip(held(), before, strict=True):
        assert_coded(keys, old_keys, 1, bits[0])
        assert_coded(values.unflatten(3, groups), old_values.unflatten(3, groups), 4, bits[1])
    for layer in engine.layers.values():
        if engine.config.additional_config["kvplug"]["policy"].startswith("quest"):
            keys = layer.impl.read_pages(layer, layer.kv_cache, blocks[:, None])[0]
            tail = layer.impl.views(layer, layer.kv_cache).tail[blocks]
            assert torch.equal(tail, torch.stack([keys.amin(1), keys.amax(1)], 2))


def test_pages_of_windowed_layers_come_back_as_theirs(engine, tmp_path, prompts, worker):
    """Two cache groups, whose blocks are of one pool and whose pages share the host's rows."""
    build_random_gemma3(tmp_path / "gemma3")
    asked, options = prompts(*LENGTHS), {**SMALL, "num_gpu_blocks_override": 70}
    with engine(
        tmp_path / "gemma3", {"policy": "quest(budget=96, dense_layers=0)"},
        kv_transfer_config=connector(format="kivi(bits=8)"), **options,
    ) as ours:  # fmt: skip
        ours.poison(freed=False)
        pages, held, checked = worker[0].pages, {}, []

        def numbers(group: int, block: int) -> list[torch.Tensor]:
            at = torch.tensor([[block]])
            return [
                torch.stack(layer.impl.read_pages(layer, layer.kv_cache, at))
                for layer in pages.layers[group]
            ]

        def store(job, pool, rows):
            for group, block, row in places(worker[0], pool, rows):
                held[row] = numbers(group, block)
            return stored(job, pool, rows)

        def load(job, rows, pool):
            done = loaded(job, rows, pool)
            for group, block, row in places(worker[0], pool, rows):
                for new, old in zip(numbers(group, block), held[row], strict=True):
                    assert (new - old).abs().max() < 0.01 * (old.amax() - old.amin())
                checked.append(group)
            return done

        stored, loaded = worker[0].submit_store, worker[0].submit_load
        worker[0].submit_store, worker[0].submit_load = store, load
        one_by_one(ours, asked)
        _, cached = one_by_one(ours, asked)
        assert min(cached) > 0
        assert set(checked) == {0, 1}


def places(worker, pool, rows) -> list[tuple[int, int, int]]:
    """Group, block and row of each page that a job moves."""
    return [
        (group, block, row)
        for group, blocks, of in worker._some(pool, rows)
        for block, row in zip(blocks.tolist(), of.tolist(), strict=True)
    ]


TEXTS = [topic for _, topic in sorted(pydoc_data.topics.topics.items()) if len(topic) > 4000][:3]


@pytest.mark.cpu
def test_eight_bits_answer_texts_as_dense_does_and_the_host_holds_so_many_more(
    engine, smollm2, worker
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = [tokenizer(text[:3000])["input_ids"] for text in TEXTS]
    options = {"block_size": S, "max_model_len": 1024}
    with engine(smollm2, {"policy": "dense"}, **options) as plain:
        dense = plain.generate(asked, 24)
    pages = sum(len(prompt) // S for prompt in asked)
    for bits in (8, 4):
        transfer = connector(8 << 20, format=f"kivi(bits={bits})")
        with engine(smollm2, {"policy": "dense"}, kv_transfer_config=transfer, **options) as ours:
            assert ours.generate(asked, 24) == dense  # nothing came from the host
            ours.forget()
            again, cached = one_by_one(ours, asked, 24)
            assert sum(cached) == pages * S
            if bits == 8:
                assert again == dense
            layer = next(iter(ours.layers.values()))
            plain_page = len(ours.layers) * layer.kv_cache[0].numel() * 4
            layout = worker[0].pages.layouts[0]
            ratio, stored = layout.plain_bytes / layout.page_bytes, metric(ours, STORED)
            assert pages * plain_page / stored >= 0.95 * ratio
            assert len(worker[0].host) * plain_page >= 0.95 * ratio * (8 << 20)
            assert worker[0].host.numel() <= 8 << 20


@pytest.mark.parametrize("format, fits", [("plain", 2), ("kivi(bits=8)", 3)])
def test_a_full_host_keeps_what_it_can_and_loses_no_answer(
    engine, random_llama, prompts, format, fits
):
    asked, page = prompts(400, 401, 402), 2 * 2 * 2 * S * 64 * 4
    transfer = connector(25 * page, format=format)
    crowded = {"num_gpu_blocks_override": 17, "max_model_len": 480}
    with engine(
        random_llama(), {"policy": "dense"}, kv_transfer_config=transfer, **crowded
    ) as ours:
        ours.poison(freed=False)
        first, second, third = asked
        said, cached = one_by_one(ours, [first, second, first, second])
        assert cached == [0, 0, 384, 384]
        (other,), _ = one_by_one(ours, [third])
        again, cached = one_by_one(ours, [first, second])
        assert cached == [384, 384] if fits == 3 else max(cached) < 384
        together = ours.generate(asked)
        assert all(len(answer) == 16 for answer in together)
        if format == "plain":
            assert said[2:] == said[:2] == again
            assert together == [*again, other]
        assert ours.free_blocks == 16
