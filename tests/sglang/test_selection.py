"""Digests say what their pages hold, whoever wrote the keys, and are paid for in the pool."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize(
    "policy",
    ["quest(budget=64, dense_layers=0)", "snapkv(budget=96) + quest(budget=64, dense_layers=0)"],
)
def test_digests_are_their_pages_extremes(engine, random_llama, prompts, policy, page_size):
    batch = prompts(500, 333, 40, 1, seed=16)
    with engine(random_llama(), policy, page_size=page_size) as planned:
        checked = []

        def check():
            """Of the pages of every row, while requests run."""
            from kvplug_sglang.settings import Engine

            backend = planned.backend
            for request in planned.scheduler.running_batch.reqs:
                tenant = Engine.serving().router.tenants.get(request.rid)
                if tenant is None or len(request.output_ids) != 6:
                    continue
                # Under overlap the last allocated token may not be written yet.
                filled = request.kv.kv_allocated_len - 2
                row = backend.req_to_token_pool.req_to_token[request.kv.req_pool_idx, :filled]
                row = row[request.kv.cache_protected_len if tenant.swapped else 0 :].long()
                row = row[: len(row) // page_size * page_size].view(-1, page_size)
                for layer in backend.layers:
                    keys = backend.token_to_kv_pool.get_key_buffer(layer)[row]  # [P, S, H, D]
                    digest = backend.digests.of_layer(layer)[row[:, 0] // page_size]
                    if page_size == 128:  # blocks of four pages
                        keys, digest = (
                            keys.unflatten(1, (4, 32)).flatten(0, 1),
                            digest.flatten(0, 1),
                        )
                    assert torch.equal(digest[:, :, 0], keys.amin(1))
                    assert torch.equal(digest[:, :, 1], keys.amax(1))
                checked.append(request.rid)

        planned.steps.append(check)
        planned.generate(batch, 16)
        assert len(set(checked)) == 4
        assert planned.backend.selected_queries > 0
        counted = planned.counted()
        whole = [500 // page_size, 333 // page_size] if "snapkv" in policy else []
        rest = [pages - -(-96 // page_size) for pages in whole]
        rows = 2 * page_size // min(page_size, 32)
        page = (2 * page_size + rows) * 2 * 2 * 64 * 4  # rows of two layers' two heads of 64, fp32
        assert counted["returned_blocks"] == sum(whole)
        assert counted["saved_bytes"] == sum(rest) * page, "digests are freed with their pages"


def test_codes_are_those_of_their_pages_whoever_wrote_them(engine, random_llama, prompts):
    """Prefilled in chunks, decoded, packed: a full page says what its keys say now."""
    from kvplug_kernels.key_codes import update_key_codes

    batch, size = prompts(500, 333, 40, 1, seed=16), 16
    policy = "snapkv(budget=96) + twilight(budget=0.3, dense_layers=0)"
    with engine(random_llama(), policy, page_size=size) as planned:
        checked = []

        def check():
            from kvplug_sglang.settings import Engine

            backend = planned.backend
            for request in planned.scheduler.running_batch.reqs:
                tenant = Engine.serving().router.tenants.get(request.rid)
                if tenant is None or len(request.output_ids) != 20:
                    continue
                filled = request.kv.kv_allocated_len - 2
                row = backend.req_to_token_pool.req_to_token[request.kv.req_pool_idx, :filled]
                row = row[request.kv.cache_protected_len if tenant.swapped else 0 :].long()
                pages = row[: len(row) // size * size : size] // size
                for layer in backend.layers:
                    held = backend.digests.of_layer(layer)
                    keys = backend.token_to_kv_pool.get_key_buffer(layer)
                    cached = keys[: len(held) * size].unflatten(0, (-1, size))
                    wanted = torch.zeros_like(held)
                    update_key_codes(wanted, cached, pages * size + size - 1, 2)
                    same = held[pages].view(torch.int32) == wanted[pages].view(torch.int32)
                    assert len(pages)
                    assert same.all()
                checked.append(request.rid)

        planned.steps.append(check)
        together = planned.generate(batch, 24)
        assert len(set(checked)) == 4
        assert planned.backend.selected_queries > 0
        planned.forget()
        assert [planned.generate([prompt], 24)[0] for prompt in batch] == together


def test_a_token_costs_its_share_of_the_digests(engine, random_llama):
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    def bytes_per_token(planned):
        configurator = planned.scheduler.tp_worker.model_runner.kv_cache_configurator
        return DefaultPoolConfigurator(configurator)._cell_size

    with engine(random_llama(), "snapkv(budget=64)", page_size=32) as plain:
        pool = plain.allocator.get_kvcache()
        alone = bytes_per_token(plain)
        assert alone * (pool.size + 32) == sum(pool.get_kv_size_bytes())
    with engine(random_llama(), "quest(budget=64)", page_size=None) as planned:
        assert planned.scheduler.page_size == 32, "the default with a digest"
        digests = planned.backend.digests.rows
        assert bytes_per_token(planned) * 32 == alone * 32 + digests[:, 0].nbytes


def test_selection_reads_what_it_says(engine, random_llama, prompts):
    from prometheus_client import REGISTRY

    def total(name):
        return REGISTRY.get_sample_value(f"kvplug_{name}_total", {"policy": line}) or 0.0

    line = "quest(budget=64, dense_layers=0)"
    batch = prompts(496, 240, seed=17)
    with engine(random_llama(), line) as planned:
        before = total("read_tokens"), total("cached_tokens")
        planned.generate(batch, 3)
        read, cached = total("read_tokens") - before[0], total("cached_tokens") - before[1]
        assert cached == 497 + 498 + 241 + 242
        assert read == 2 * (49 + 50), "three full pages and what the last one holds"


def test_a_cache_in_another_dtype_than_the_models(engine, random_llama, prompts):
    batch = prompts(500, 40, seed=17)
    with engine(random_llama(), kv_cache_dtype="bfloat16") as stock:
        expected = stock.generate(batch, 12)
    everything = {"policy": "quest(budget=4096, dense_layers=0)", "shortcut": False}
    with engine(random_llama(), json.dumps(everything), kv_cache_dtype="bfloat16") as planned:
        assert planned.generate(batch, 12) == expected
        assert planned.backend.selected_queries > 0
