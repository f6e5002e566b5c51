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
        "pack_tokens", "key_codes", "code_logits", "token_select", "token_chain",
        "encode_pages", "decode_pages", "coded_decode", "coded_dense",
        "resident_pages", "resident_there",
        *report["method"]["baselines"],
    }  # fmt: skip
    for timing in cell["timings"].values():
        assert 0 < timing["p20_us"] <= timing["median_us"] <= timing["p80_us"]
        assert timing["of_copy_bandwidth"] > 0
    assert cell["dense_kernel_minus_sdpa"] < 1e-4
    assert report["fa3"] == {"why_not": "no CUDA device"}
    assert "FlashAttention 3 is not measured: no CUDA device" in done.stdout
    assert set(cell["speedup"]) == set(report["method"]["baselines"])
    assert "chain" in done.stdout


def plain_attention(query, keys, values, table, lengths, longest, splits=0):
    """What FlashAttention 3 is asked for: one query of each sequence over its pages."""
    size, out = keys.shape[1], torch.empty_like(query)
    assert lengths.max() <= longest <= table.shape[1] * size
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // size)].long()
        k, v = (pool[pages].flatten(0, 1)[:length] for pool in (keys, values))  # [T, H, D]
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", query[row], k) * query.shape[-1] ** -0.5
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
    return out


@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
def test_flash_attention_is_handed_the_tokens_that_our_kernel_reads(monkeypatch, heads):
    from kvplug_kernels import flash3
    from kvplug_kernels.decode_shapes import DecodeShape, decode_inputs
    from kvplug_kernels.sparse_decode import bench, reference

    Hq, H = heads
    shape = DecodeShape(B=2, tokens=4103, Hq=Hq, H=H, D=32, S=16)
    i = decode_inputs(shape, "cpu", torch.float32)
    assert 1 < shape.kept_pages < shape.pages
    every = torch.arange(shape.pages, dtype=torch.int32).repeat(shape.B, H, 1)
    arguments = i.query, i.keys, i.values, i.page_table
    rest = i.lengths, shape.D**-0.5
    selected = reference.sparse_decode(*arguments, i.chosen, i.counts, *rest)
    dense = reference.sparse_decode(
        *arguments, every, torch.full_like(i.counts, shape.pages), *rest
    )
    monkeypatch.setattr(flash3, "attend", plain_attention)
    names = []
    for build in bench.FA3_CASES:
        case = build(i)
        names.append(case.name)
        wanted = dense if case.name == "fa3_dense" else selected
        torch.testing.assert_close(case.call(), wanted, rtol=1e-4, atol=1e-5)
    assert names == ["fa3_dense", "fa3_selected", "fa3_selected_32", "fa3_tokens"]


def test_shapes_for_which_there_is_no_time_are_named(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run_suite("--out", tmp_path, "--dry-run", "--budget", "1")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 1  # the tests got no time either
    assert report["cells"] == []
    assert report["not_run"][0]["tokens"] == 4103
    assert "took more than 1 s" in report["tests"]["why"]
