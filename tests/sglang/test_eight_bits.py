"""SGLang's fp8 caches, which kvplug serves over FlashAttention 3: here plain PyTorch that is held
to its contract, of queries of e4m3 too and a scale for a layer's keys and one for its values."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from definition import Reads
from test_eviction import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OPTIONS = {"kv_cache_dtype": "fp8_e4m3"}
FULL = [
    "quest(budget=4096, dense_layers=0)",
    "streaming_llm(sinks=4, window=4096) + twilight(budget=1.0, dense_layers=0)",
    "snapkv(budget=4096) + twilight(budget=4096, dense_layers=0)",
    "pyramid(keydiff(budget=4096), beta=1.2)",
]
SCALES = {"k_scale": 0.3, "v_scale": 1.7}


@pytest.fixture(autouse=True)
def scaled(monkeypatch):
    """As a checkpoint that was calibrated has them."""
    import flash
    from sglang.srt.layers.radix_attention import RadixAttention

    flash.install(monkeypatch.setattr)
    plain = RadixAttention.__init__

    def with_scales(layer, *args, **kwargs):
        plain(layer, *args, **kwargs)
        for name, scale in SCALES.items():
            setattr(layer, name, torch.tensor(scale, dtype=torch.float32))
            setattr(layer, f"{name}_float", scale)

    monkeypatch.setattr(RadixAttention, "__init__", with_scales)


def turns(engine, prompts):
    first = prompts(300, 33, 1)
    second = [prompt + first[1] for prompt in first]
    return [engine.generate(batch, 6) for batch in (first, second)]


def test_full_budget_equals_stock(engine, random_llama, prompts):
    """In bfloat16, as FlashAttention answers over such a cache."""
    model = random_llama()
    with engine(model, attention_backend="fa3", **OPTIONS, dtype="bfloat16") as stock:
        expected = turns(stock, prompts)
        assert {each.k_scale_float for each in attending(stock)} == {0.3}
    for line in FULL:
        settings = json.dumps({"policy": line, "shortcut": False})
        with engine(model, settings, **OPTIONS, dtype="bfloat16") as planned:
            assert turns(planned, prompts) == expected, line
            assert type(planned.backend).__module__ == "kvplug_sglang.cuda_flash"
            assert planned.backend.token_to_kv_pool.dtype is torch.float8_e4m3fn
            packs = line.startswith(("snapkv", "pyramid"))
            assert planned.backend.packed_prompts == (5 if packs else 0)


def attending(engine):
    from kvplug_sglang import compat

    return compat.attending(engine.scheduler.tp_worker.model_runner)


def test_below_it_is_the_definition_over_what_lies_in_the_cache(
    engine, random_llama, prompts, monkeypatch
):
    batch, model = prompts(300, 200, 33), random_llama()
    offer = {"policy": "quest(budget=96, dense_layers=0)", "allow": ["snapkv", "keydiff"],
             "max_budget": 256, "shortcut": False}  # fmt: skip
    with engine(model, json.dumps(offer)) as wide:
        bytes_of_four = wide.backend.engine.page_bytes
    # Queries of fp32 choose without ties: what kvplug reads, it hands on in the model's own type.
    with engine(model, json.dumps(offer), **OPTIONS, dtype="float32") as planned:
        token, digest = planned.backend.engine.layer_bytes
        assert (token, digest) == (2 * 2 * 64, 2 * 2 * 64 / 16), "of eight bits, as digests are"
        assert planned.backend.engine.page_bytes * 4 == bytes_of_four
        reads, shadow = Reads(monkeypatch), Shadow(monkeypatch)
        together = planned.generate(batch, 6)
        assert reads.checked == 2 * 3 * 5
        assert reads.spared > 0
        for line in ("snapkv(budget=96, window=16) + quest(budget=64, dense_layers=0)",
                     "keydiff(budget=100)"):  # fmt: skip
            planned.forget()
            shadow.made.clear()
            assert planned.generate([batch[0]], 4, line) != [together[0][:4]]
        assert shadow.packed == 2 * 2


def test_a_checkpoint_s_own_cache_of_eight_bits_is_refused_where_kernels_differ(monkeypatch):
    from kvplug_sglang.attention import PlannedAttention
    from kvplug_sglang.settings import Engine

    class Stock:
        token_to_kv_pool = SimpleNamespace(dtype=torch.float8_e4m3fn)

        def __init__(self, runner):
            pass

    class Planned(PlannedAttention, Stock):
        pass

    monkeypatch.setattr(Engine, "of", lambda runner: SimpleNamespace(dense=False))
    with pytest.raises(ValueError, match=r"checkpoint's KV cache is fp8.* use --kv-cache-dtype"):
        Planned(None)
