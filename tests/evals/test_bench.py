"""The benchmark of one layer: what it writes down, and that a wrong output stops it."""

import io
import json
from pathlib import Path

import pytest

rich = pytest.importorskip("rich.console")
pytest.importorskip("vllm")

import torch  # noqa: E402

from kvplug_evals.bench.options import (  # noqa: E402
    Clock,
    Dtype,
    Options,
    Pages,
    Policy,
    read_heads,
)


def options(out: Path = Path("bench.json"), **changes) -> Options:
    return Options(
        **{
            "threads": 1,
            "batch": [2],
            "context": [500],  # 15 pages and a part of one
            "heads": [read_heads("4/2/64")],
            "dtype": [Dtype.FP32],
            "budget": 128,
            "block_size": 32,
            "repeats": 7,
            "pages": Pages.SHUFFLED,
            "clock": Clock.WALL,
            "out": out,
            "command": "kvplug bench attention",
            **changes,
        }
    )


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Measures in this process and returns what was written."""
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, {"VLLM_LOGGING_LEVEL": "ERROR"}.get(name, "nobind"))
    from kvplug_evals.bench.run import run_bench

    threads = torch.get_num_threads()
    out = tmp_path / "new" / "bench.json"

    def measure(**changes) -> tuple[dict, str]:
        run_bench(options(out, **changes), rich.Console(file=io.StringIO()))
        return json.loads(out.read_text()), out.with_suffix(".txt").read_text()

    yield measure
    torch.set_num_threads(threads)


def test_a_cell_says_what_was_measured_where_and_how_well(bench):
    written, table = bench(dtype=[Dtype.FP32, Dtype.BF16])
    for fact in ("command", "date", "commit", "cpu", "threads", "vllm", "torch", "load_at_end"):
        assert written["provenance"][fact]
    assert written["left_out"] == []
    for cell, dtype in zip(written["cells"], ["float32", "bfloat16"], strict=True):
        assert cell["heads"] == {"name": "4/2/64", "query": 4, "kv": 2, "dim": 64}
        assert (cell["dtype"], cell["batch"], cell["context"]) == (dtype, 2, 500)
        for name in ("stock_ms", "quest_ms", "ratio"):
            assert 0 < cell[name]["p20"] <= cell[name]["median"] <= cell[name]["p80"]
        assert cell["best_ratio"] == pytest.approx(1 / (1 / 32 + 128 / 500))
        assert cell["share_of_best"] == pytest.approx(cell["ratio"]["median"] / cell["best_ratio"])
        assert cell["loses"] == (cell["ratio"]["median"] < 1)
        parts = {name: spread["median"] for name, spread in cell["parts_ms"].items()}
        assert list(parts) == ["write", "bound", "select", "tables", "attention"]
        assert min(parts.values()) > 0
        pages = 2 * 16 + 1
        assert cell["cache_bytes"]["quest"] - cell["cache_bytes"]["stock"] == (
            pages * 2 * 2 * 64 * (4 if dtype == "float32" else 2)
        )
        assert 0 <= cell["checked"]["output"] < 1e-2
    assert "bfloat16" in table
    assert "of 2 cells lose" in table


def test_a_cell_of_twilight_names_its_own_parts(bench):
    """Its tokens are those of the highest weights, by the codes of the keys that were written."""
    written, table = bench(policy=Policy.TWILIGHT, dtype=[Dtype.FP32, Dtype.BF16])
    for cell in written["cells"]:
        assert cell["twilight_ms"]["median"] > 0
        assert list(cell["parts_ms"]) == ["write", "candidates", "logits", "select", "attention"]
        assert min(spread["median"] for spread in cell["parts_ms"].values()) > 0
        assert 0 <= cell["checked"]["output"] < 1e-2
    assert "twilight(budget=128)" in table


@pytest.mark.parametrize("policy", [Policy.QUEST, Policy.TWILIGHT])
def test_a_block_of_several_pages_is_read_in_parts(bench, policy):
    written, _ = bench(policy=policy, dtype=[Dtype.FP32], block_size=128)
    (cell,) = written["cells"]
    assert 0 <= cell["checked"]["output"] < 1e-2
    rows = {Policy.QUEST: 2, Policy.TWILIGHT: 4}[policy]
    assert cell["best_ratio"] == pytest.approx(1 / (rows / 64 + 128 / 500))


def test_candidates_read_less_and_are_those_of_the_bounds(bench):
    written, table = bench(policy=Policy.TWILIGHT, dtype=[Dtype.FP32], candidates=0.5)
    (cell,) = written["cells"]
    assert 0 <= cell["checked"]["output"] < 1e-2
    assert cell["best_ratio"] == pytest.approx(1 / ((2 + 2 * 0.5) / 64 + 128 / 500))
    assert "twilight(budget=128, candidates=0.5)" in table
    with pytest.raises(ValueError, match="drop --candidates with quest"):
        bench(candidates=0.5)


def test_a_choice_of_lesser_tokens_stops_the_bench(bench, monkeypatch):
    from kvplug import selection
    from kvplug_evals.bench.attention import WrongOutput

    choose = selection.token_select
    monkeypatch.setattr(
        selection, "token_select", lambda logits, *a, **k: choose(-logits, *a, **k)
    )
    with pytest.raises(WrongOutput, match="outbids the lowest of them"):
        bench(policy=Policy.TWILIGHT)


def test_only_the_shortest_context_is_checked_and_others_are_measured_too(bench):
    written, _ = bench(context=[500, 600])
    assert [cell["checked"] is None for cell in written["cells"]] == [False, True]


def test_a_wrong_table_of_pages_stops_the_bench(bench, monkeypatch):
    from kvplug_evals.bench.attention import WrongOutput
    from kvplug_vllm import attention

    tables = attention.virtual_heads

    def other_page(*args, **kwargs):
        table, lengths = tables(*args, **kwargs)
        table[0, 0] = table[1, 0]
        return table, lengths

    monkeypatch.setattr(attention, "virtual_heads", other_page)
    with pytest.raises(WrongOutput, match="the output is off by"):
        bench()


def test_a_choice_of_lesser_pages_stops_the_bench(bench, monkeypatch):
    from kvplug import selection
    from kvplug_evals.bench.attention import WrongOutput

    choose = selection.page_select
    monkeypatch.setattr(selection, "page_select", lambda scores, *a, **k: choose(-scores, *a, **k))
    with pytest.raises(WrongOutput, match="outbids the lowest of them"):
        bench()


def test_a_cell_that_does_not_fit_is_left_out_and_said(bench, monkeypatch):
    from kvplug_evals.bench import run

    monkeypatch.setattr(run, "available_bytes", lambda: 1 << 20)
    written, table = bench()
    assert written["cells"] == []
    assert "GiB" in written["left_out"][0]["reason"]
    assert "left out: 4/2 heads of 64, float32, B=2, 500 tokens" in table


def test_options_survive_the_way_to_the_process_that_measures():
    assert Options.from_json(options().as_json()) == options()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context": [128]}, "a context of 128 tokens is within the budget of 128"),
        ({"block_size": 16}, "block size must be a multiple of 32"),
        ({"clock": Clock.CPU, "threads": 2}, "add --threads 1"),
    ],
)
def test_options_that_would_measure_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


@pytest.mark.parametrize("name", ["llama", "4/2", "4/0/64", "5/2/64"])
def test_heads_that_nobody_has_are_refused(name):
    with pytest.raises(ValueError, match="heads"):
        read_heads(name)
