"""The benchmark of a prompt's chunk: what it counts and writes down. It judges no time."""

import io
import json

import pytest

rich = pytest.importorskip("rich.console")
pytest.importorskip("vllm")

import torch  # noqa: E402

from kvplug_evals.bench.options import Clock, read_heads  # noqa: E402


def options(out, *policies, **changes):
    from kvplug_evals.bench.prefill import Options

    return Options(
        **{
            "policies": list(policies),
            "context": [640],
            "chunk": 128,
            "heads": [read_heads("4/2/64")],
            "dtype": "float32",
            "block_size": 32,
            "repeats": 3,
            "threads": 1,
            "clock": Clock.CPU,
            "out": out,
            "command": "kvplug bench prefill",
            **changes,
        }
    )


def test_what_was_read_is_counted_and_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    from kvplug_evals.bench.prefill import Options, run

    lines = [
        "a_shape(sinks=32, window=65, last=0)",
        "xattention(threshold=None, budget=192, sinks=32, last=0)",
        "block_quest(budget=192, sinks=32, last=0)",
        "xattention(threshold=1.0, sinks=32, last=0)",
    ]
    asked, threads = options(tmp_path / "new" / "prefill.json", *lines), torch.get_num_threads()
    assert Options.from_json(asked.as_json()) == asked
    try:
        run(asked, rich.Console(file=io.StringIO()))
    finally:
        torch.set_num_threads(threads)
    cells = json.loads(asked.out.read_text())["cells"]
    assert [cell["policy"] for cell in cells] == lines
    # Blocks at 512 and 576: a page of sinks, two of the window and two of their own.
    seen = sum(range(513, 641)) / 128
    assert cells[0]["read"] == pytest.approx((3 * 32 + 32.5) / seen, rel=1e-6)
    assert cells[1]["read"] == cells[2]["read"] == pytest.approx((6 + 6) / (18 + 20))
    assert cells[3]["read"] == 1
    assert set(cells[0]["parts"]) == {"attention"}
    assert {"keys", "estimate", "select", "tables", "attention"} == set(cells[1]["parts"])
    assert {"bounds", "select", "tables", "attention"} == set(cells[2]["parts"])
    shown = asked.out.with_suffix(".txt").read_text()
    assert all(line in shown for line in lines)


@pytest.mark.parametrize(
    "line, changes, message",
    [
        ("quest", {}, "write, for example, xattention"),
        ("xattention", {"context": [128]}, "has nothing before its last chunk of 128"),
        ("xattention", {"threads": 2}, "add --threads 1"),
        ("xatention", {}, "Did you mean 'xattention'"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, line, changes, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path / "x.json", line, **changes)
