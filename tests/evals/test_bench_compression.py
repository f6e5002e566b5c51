"""``kvplug bench compression``: engines of their own, pair by pair, and what is refused."""

import io
import json
from pathlib import Path

import pytest

rich = pytest.importorskip("rich.console")

from kvplug_evals.bench.compression import DECODES, Options, Result, Steps, run  # noqa: E402
from kvplug_evals.bench.options import Clock  # noqa: E402
from kvplug_evals.models.random_llama import build_random_llama  # noqa: E402


def options(folder: Path, **changes) -> Options:
    given = {
        "policies": ["knorm(budget=96)"],
        "model": folder,
        "tokens": 300,
        "chunk": 128,
        "block_size": 32,
        "repeats": 3,
        "threads": 1,
        "clock": Clock.CPU,
        "out": folder / "bench.json",
        "command": "kvplug bench compression",
    }
    return Options(**(given | changes))


@pytest.fixture
def model(tmp_path):
    build_random_llama(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_both_engines_serve_the_same_prompts_and_one_compresses(model, monkeypatch):
    for name, value in (("OMP_NUM_THREADS", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    (result,) = run(options(model), rich.Console(file=io.StringIO()))
    assert len(result.pairs) == 3
    for dense, ours in result.pairs:
        assert dense.packed == 0 < ours.packed
        assert dense.first_token > dense.decode > 0
    written = json.loads((model / "bench.json").read_text())
    assert written["policies"][0]["cost_of_ttft"] == sorted(result.shares)[1]
    assert written["provenance"]["load_at_end"] >= 0
    table = " ".join((model / "bench.txt").read_text().split())
    assert "knorm(budget=96)" in table
    assert f"the {DECODES - 1} steps behind it" in table


def test_the_cost_is_the_packing_step_less_an_ordinary_one():
    dense = Steps(first_token=1000, packing=50, decode=50, packed=0)
    pairs = [
        (dense, Steps(first_token=first, packing=50 + cost, decode=50, packed=30))
        for first, cost in ((1100, 20), (1000, 60), (900, 40))
    ]
    result = Result(policy="snapkv", pairs=pairs)
    assert result.shares == [0.02, 0.04, 0.06]
    assert result.slower_prefill == 1
    assert result.holds
    assert not Result(policy="snapkv", pairs=pairs[1:2]).holds


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policies": ["quest"]}, "quest compresses no prompt"),
        ({"policies": ["snapkv(budget=300)"]}, "300 tokens are within snapkv"),
        ({"threads": 2}, "add --threads 1"),
        ({"model": Path("nowhere")}, "no model in nowhere"),
    ],
)
def test_options_that_would_measure_nothing_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        options(model, **changes)
