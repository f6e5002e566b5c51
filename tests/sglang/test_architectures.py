"""Models whose layers share caches, or have attention sinks, over kernels that take them.

In this process over FlashAttention 3, plain PyTorch that is held to its contract; in another over
SGLang's own Triton kernels, interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from definition import Reads
from test_eviction import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MODELS = {"gemma3n": "random_shared", "gpt_oss": "random_gpt_oss", "gemma4": "random_shared"}
LAYERS = {"gemma3n": [1, 3, 3], "gpt_oss": [1, 3]}
"""That see all, one that shares a cache by its owner's number."""
ONE_POOL = {"disable_hybrid_swa_memory": True}
FORCED = [
    "keydiff(budget=4096) + quest(budget=4096, dense_layers=0)",
    "streaming_llm(sinks=4, window=4096)",
]
SMALL = [
    "quest(budget=96, dense_layers=0)",
    "keydiff(budget=256)",
    "random(budget=256) + quest(budget=64, dense_layers=0)",
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def build(name):
        folder = tmp_path_factory.mktemp("model") / name
        module = import_module(f"kvplug_evals.models.{MODELS[name]}")
        getattr(module, f"build_random_{name}")(folder)
        return folder

    return build


@pytest.fixture(params=LAYERS)
def model(request, build, monkeypatch):
    import flash
    from sglang.srt.model_executor import model_runner

    flash.install(monkeypatch.setattr)
    if request.param == "gemma3n":  # whose widths, one a layer, SGLang's CPU engine trips over
        monkeypatch.setattr(
            model_runner, "adjust_config_with_unaligned_cpu_tp", lambda config, *_: config
        )
    return request.param, build(request.param)


def test_a_policy_is_stock_at_full_budget_and_its_definition_below(
    engine, model, prompts, monkeypatch
):
    (name, folder), first = model, prompts(500, 330, 33, 1)
    second = [prompt + first[2] for prompt in first]
    with engine(folder, attention_backend="fa3", **ONE_POOL) as stock:
        expected = [stock.generate(batch, 6) for batch in (first, second)]
    for policy in FORCED:
        settings = json.dumps({"policy": policy, "shortcut": False})
        with engine(folder, settings, **ONE_POOL) as planned:
            assert [planned.generate(batch, 6) for batch in (first, second)] == expected, policy
            assert type(planned.backend).__module__ == "kvplug_sglang.cuda_flash"
            assert planned.backend.layers == LAYERS[name]
            packs = policy.startswith("keydiff")
            assert planned.backend.packed_prompts == (7 if packs else 0), "by the owners alone"
            if packs:
                hits = [planned.cached(rid) for rid in list(planned.requests)[4:]]
                assert hits == [496, 320, 32, 0]
                read = planned.counted()
                assert read["read_bytes"] > read["cached_bytes"] > 0, "and digests"
            assert sum(planned.free) == 16384
    offer = {"policy": "dense", "allow": ["quest", "keydiff", "random"], "max_budget": 256}
    with engine(folder, json.dumps(offer), **ONE_POOL) as planned:
        asked = [(prompt, line) for line in (None, *SMALL) for prompt in first]
        rids = [planned.send(prompt, 6, line) for prompt, line in asked]
        planned.drain()
        together = [planned.output(rid) for rid in rids]
        assert together[: len(first)] == expected[0]
        assert together[len(first) :] != expected[0] * len(SMALL), "budgets small enough to matter"
        planned.forget()
        assert together == [planned.generate([prompt], 6, line)[0] for prompt, line in asked]

        planned.forget()
        reads, shadow = Reads(monkeypatch), Shadow(monkeypatch)
        planned.generate([first[0]], 4, SMALL[2])
        assert reads.checked == 3 * len(LAYERS[name])
        assert reads.spared > 0
        assert shadow.packed == len(set(LAYERS[name]))
        if name == "gemma3n":
            again = planned.send(first[0], 4, "keydiff(budget=256, chunk=128)")
            planned.drain()
            refused = planned.requests[again].finished_reason
            assert "leave interval and chunk out" in refused.message


def test_sglang_s_triton_kernels_serve_them_too(build, prompts):
    """Gemma 4, which SGLang serves over these alone on a CPU, and gpt-oss's sinks."""
    full = {"policy": FORCED[0], "shortcut": False}
    batch = prompts(70, 1, seed=21)
    for name in ("gemma4", "gpt_oss"):
        found = served(build(name), batch, [None, full])
        assert found[0]["backend"] == "sglang.srt.layers.attention.triton_backend"
        for planned in found[1:]:
            assert planned["backend"] == "kvplug_sglang.cuda_triton"
            assert planned["selected"] > 0
            assert planned["packed"] == 1, "the prompt of a page and more"
        assert found[1]["answers"] == found[0]["answers"]


def served(model, batch, cases):
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_once.py")), str(model),
         json.dumps(batch), *map(json.dumps, cases)],
        env={**os.environ, **paths}, capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
