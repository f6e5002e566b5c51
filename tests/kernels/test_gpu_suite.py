"""The part of `make gpu` that a machine without a GPU can prove."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run_suite(*arguments, **environment):
    paths = {"PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "kvplug_kernels.gpu_suite", *map(str, arguments)],
        env=inherited | paths | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = run_suite("--out", tmp_path / "results")
    assert done.returncode == 2
    assert done.stderr.strip() == "no CUDA device: nothing was run on a GPU"
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu runs the suite in earnest")
def test_dry_run_fills_a_report(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run_suite("--out", tmp_path, "--dry-run", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry_run"] is True
    assert report["gpu"] is None
    assert report["commit"] == "abc"
    assert report["torch"] == torch.__version__
    assert report["tests"]["green"]
    assert report["tests"]["tests"] > report["tests"]["skipped"]
    (cell,) = report["cells"]
    assert set(cell["timings"]) == {
        "page_digest", "page_bound", "page_select", "sparse_decode", "chain",
        "pack_tokens",
        *report["method"]["baselines"],
    }  # fmt: skip
    for timing in cell["timings"].values():
        assert 0 < timing["p20_us"] <= timing["median_us"] <= timing["p80_us"]
        assert timing["of_copy_bandwidth"] > 0
    assert cell["dense_kernel_minus_sdpa"] < 1e-4
    assert set(cell["speedup"]) == set(report["method"]["baselines"])
    assert "chain" in done.stdout


def test_shapes_for_which_there_is_no_time_are_named(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run_suite("--out", tmp_path, "--dry-run", "--budget", "1")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 1  # the tests got no time either
    assert report["cells"] == []
    assert report["not_run"][0]["tokens"] == 4103
    assert "took more than 1 s" in report["tests"]["why"]
