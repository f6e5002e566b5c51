"""The engine's own fp8 cache and sliding window, as rows of a sweep."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from kvplug_evals.engines.interface import EngineOptions, Request
from kvplug_evals.engines.start import start_engine
from kvplug_evals.engines.stock import parse_stock
from kvplug_evals.models.recall import recall_prompt, word
from kvplug_evals.sweep.plot import family
from kvplug_evals.sweep.report import results, write_report
from kvplug_evals.sweep.session import Run, run_sweep
from kvplug_evals.sweep.settings import Suite, expand, read_suite

RECALL = Path(__file__).parents[2] / ".models" / "recall"
FP8, WINDOW = "engine(kv_cache_dtype=fp8_e4m3)", "engine(sliding_window=256)"
FP8_RUNS = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
needs_fp8 = pytest.mark.skipif(
    not FP8_RUNS, reason="vLLM keeps fp8 caches on CPUs with AVX-512 or AMX, this one has neither"
)


def test_a_line_prints_as_it_is_read():
    for line in (FP8, WINDOW, "engine(kv_cache_dtype=fp8, sliding_window=64)"):
        assert str(parse_stock(line)) == line
    assert parse_stock(WINDOW).reads(100) == 100
    assert parse_stock(WINDOW).reads(1000) == 256
    assert parse_stock(FP8).reads(1000) == 1000


@pytest.mark.parametrize(
    "line, message",
    [
        ("engine()", r"write engine\(kv_cache_dtype=fp8_e5m2\) or engine\(sliding_window=512\)"),
        ("engine(sliding_window=0)", "write engine"),
        ("engine(block_size=16)", "write engine"),
        ("engine(kv_cache_dtype=int8_per_token_head)", "must be fp8, fp8_e4m3, fp8_e5m2, got"),
    ],
)
def test_what_is_no_such_option_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        expand(Suite(name="mine", tasks={"kvplug_recall": {}}), "vllm", [line], baselines=False)


def test_rows_of_the_engine_stand_among_policies():
    suite = Suite(
        name="mine",
        tasks={"kvplug_recall": {}},
        tokens=(1024,),
        budgets=(0.25,),
        policies=("engine(sliding_window={budget})", FP8),
    )
    assert [s.policy for s in expand(suite, "vllm", [], baselines=True)] == [
        "dense",
        WINDOW,
        FP8,
        "random(budget=256, sinks=4, window=0, seed=0)",
        "streaming_llm(sinks=32, window=224)",
    ]
    with pytest.raises(ValueError, match="options of vLLM; leave it out with --engine sglang"):
        expand(suite, "sglang", [], baselines=False)
    assert family(WINDOW) == "engine(sliding_window)"
    assert family(FP8) == FP8


@pytest.fixture(scope="module")
def asked():
    """A question about the start and one about the end of a context -> what each engine did."""
    prompt = recall_prompt(800, 100, 8, seed=5, disjoint=True)
    order = sorted(range(8), key=prompt.positions.__getitem__)
    requests = [
        Request(
            key=str(place),
            prompt=prompt.tokens,
            forced=[prompt.questions[place]],
            new_tokens=1,
        )
        for place in (order[0], order[-1])
    ]
    answers = [word(prompt.answers[int(r.key)][0]) for r in requests]
    options = EngineOptions(
        model=str(RECALL), max_model_len=1024, max_num_seqs=2, kv_cache_mib=64, multiprocess=False
    )
    found = {}
    for policy in ("dense", FP8, WINDOW) if FP8_RUNS else ("dense", WINDOW):
        dtype = "float32" if policy == WINDOW else "auto"
        engine = start_engine("vllm", policy, replace(options, dtype=dtype))
        try:
            wave = engine.run(requests)
            backend = engine.engine.vllm_config.attention_config.backend
            right = [r.text.strip() == a for r, a in zip(wave.replies, answers, strict=True)]
            found[policy] = wave, right, engine.block_bytes, backend
        finally:
            engine.close()
    return found


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
class TestInVLLM:
    def test_kvplug_has_no_part_in_it(self, asked):
        assert asked["dense"][3].name == "KVPLUG"
        assert all(found[3] is None for policy, found in asked.items() if policy != "dense")

    @needs_fp8
    def test_fp8_halves_the_bytes_of_as_many_blocks(self, asked):
        (dense, right, block, _), (fp8, still, half, _) = asked["dense"], asked[FP8]
        assert right == still == [True, True]
        assert fp8.held_blocks == dense.held_blocks
        assert (fp8.queries, fp8.cached, fp8.read) == (dense.queries, dense.cached, dense.read)
        assert half * 2 == block

    def test_the_cache_is_of_the_dtype_that_was_asked_for(self, asked):
        numbers = 2 * 2 * 2 * 128  # of a token: layers, key and value, KV heads, head_dim
        assert asked["dense"][2] == 32 * 2 * numbers
        assert asked[WINDOW][2] == 32 * 4 * numbers

    def test_a_window_holds_and_finds_what_is_in_it(self, asked):
        wave, right, _, _ = asked[WINDOW]
        assert right == [False, True]
        assert wave.held_blocks <= 2 * (256 // 32 + 2)
        assert wave.held_blocks < asked["dense"][0].held_blocks / 2

    def test_arithmetic_says_what_counters_would(self, asked):
        dense, window = asked["dense"][0], asked[WINDOW][0]
        assert dense.queries > 0
        assert (window.queries, window.cached) == (dense.queries, dense.cached)
        assert window.read == window.queries * 256

    def test_a_row_that_this_machine_cannot_have_is_left_out_with_the_reason(
        self, tmp_path, monkeypatch
    ):
        """vLLM refuses fp8 caches on CPUs without AVX-512, as it is told this one is."""
        from rich.console import Console

        monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
        suite = replace(read_suite("smoke"), dtype="float32")
        settings = expand(suite, "vllm", [FP8, WINDOW], baselines=False)
        run = Run(out=tmp_path, command="kvplug eval", multiprocess=False)
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        run_sweep(settings, run, Console(quiet=True))
        # Left set, it makes vLLM's own LLM.generate divide by zero.
        assert "TQDM_DISABLE" not in os.environ
        assert [result.policy for result in results(tmp_path)] == ["dense", WINDOW]
        (refused,) = tmp_path.glob("*/refused.json")
        assert "requires x86 with AVX-512" in json.loads(refused.read_text())["reason"]
        text = write_report(tmp_path, []).read_text()
        assert f"the engine refused it: `{FP8}`" in text
        assert "AVX-512" in text
