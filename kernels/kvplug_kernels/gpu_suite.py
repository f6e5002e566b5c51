"""Everything that needs a GPU, in one command of under nine minutes: tests, then benchmarks.

    python -m kvplug_kernels.gpu_suite --out results/gpu

DIR/gpu.json is written anew after every cell, so that a run cut short keeps what it measured.
Exits with 0 when all went well, 1 when a test or a cell failed, 2 without a CUDA device.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvplug_kernels import flash3
from kvplug_kernels.code_logits import bench as code_logits
from kvplug_kernels.coded_decode import bench as coded_decode
from kvplug_kernels.decode_pages import bench as decode_pages
from kvplug_kernels.decode_shapes import DecodeInputs, DecodeShape, decode_inputs, serving_shapes
from kvplug_kernels.encode_pages import bench as encode_pages
from kvplug_kernels.graph_timing import Case, copy_case, describe, measure
from kvplug_kernels.key_codes import bench as key_codes
from kvplug_kernels.pack_tokens import bench as pack_tokens
from kvplug_kernels.page_bound import bench as page_bound
from kvplug_kernels.page_digest import bench as page_digest
from kvplug_kernels.page_select import bench as page_select
from kvplug_kernels.resident_pages import bench as resident_pages
from kvplug_kernels.sparse_decode import bench as sparse_decode
from kvplug_kernels.token_select import bench as token_select

ROOT = Path(__file__).parents[2]
BUDGET_S = 520.0
TESTS_S = 270.0  # of the budget, at most
CELL_S = 15.0  # no cell begins with less left: it may have to compile
NO_DEVICE = "no CUDA device: nothing was run on a GPU"
DRY_TESTS = "virtual_heads or (page_bound and lengths0)"
CASES: tuple[Callable[[DecodeInputs], Case], ...] = (
    page_digest.case,
    page_bound.case,
    page_select.case,
    sparse_decode.case,
    sparse_decode.chain_case,
    sparse_decode.dense_case,
    sparse_decode.sdpa_case,
    pack_tokens.case,
    key_codes.case,
    code_logits.case,
    token_select.case,
    token_select.chain_case,
    encode_pages.case,
    decode_pages.case,
    coded_decode.case,
    coded_decode.dense_case,
    resident_pages.case,
    resident_pages.there_case,
)

Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kvplug_kernels.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    if not (options.dry_run or torch.cuda.is_available()):
        print(NO_DEVICE, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"
    if options.dry_run:
        print("dry run on the CPU: its times say nothing about a GPU")
    report: Report = {"dry_run": options.dry_run, **provenance(options.commit)}
    report["tests"] = run_tests(options.out, min(TESTS_S, options.budget), options.dry_run)
    print(f"tests: {report['tests']}", flush=True)
    run_benchmarks(report, file, deadline, options.dry_run)
    print(f"wrote {file}")
    failed = [cell for cell in report["cells"] if "error" in cell]
    return int(bool(failed) or not report["tests"]["green"])


def provenance(commit: str | None) -> Report:
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": commit or output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": output_of("git", "-C", str(ROOT), "status", "--porcelain", "kernels"),
        "command": " ".join(["python -m kvplug_kernels.gpu_suite", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def output_of(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).__version__)


def run_tests(out: Path, seconds: float, dry_run: bool) -> Report:
    """Counts of pytest's outcomes; `green` only if tests ran and none failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"green": False, "why": "pytest is not installed: no kernel was tested"}
    folder = ROOT / "tests/kernels"
    if not folder.is_dir():
        return {"green": False, "why": f"there is no {folder}: no kernel was tested"}
    junit = out.resolve() / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    command += [f"--junitxml={junit}", "--ignore", str(folder / "test_compile.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    if dry_run:
        command += ["-k", DRY_TESTS]
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment.pop("TRITON_INTERPRET", None)
    try:
        subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"green": False, "why": f"the tests took more than {seconds:.0f} s"}
    if not junit.exists():
        return {"green": False, "why": "pytest wrote no result"}
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    green = counts["tests"] > counts["skipped"] and not counts["failures"] + counts["errors"]
    return {"green": green, **counts, "seconds": float(suite.attrib["time"])}


def run_benchmarks(report: Report, file: Path, deadline: float, dry_run: bool) -> None:
    device, dtype = ("cpu", torch.float32) if dry_run else ("cuda", torch.bfloat16)
    shapes = (
        [DecodeShape(B=1, tokens=4096 + 7, Hq=4, H=2, D=32, S=16)]
        if dry_run
        else list(serving_shapes())
    )
    copied = measure(copy_case(device, 1 << 20 if dry_run else 1 << 30))
    report["method"] = {
        "dtype": str(dtype).removeprefix("torch."),
        "timer": "clock" if dry_run else "CUDA graph replay, L2 overwritten before each",
        "copy_gb_per_s": copied.gb_per_s,
        "baselines": sparse_decode.BASELINES,
    }
    why_not = flash3.absent()
    report["fa3"] = {"library": str(flash3.library())} if why_not is None else {"why_not": why_not}
    if why_not is not None:
        print(f"FlashAttention 3 is not measured: {why_not}")
    report["cells"], report["not_run"] = [], []
    print(f"copy: {copied.gb_per_s:.0f} GB/s\n{header()}")
    for shape in shapes:
        if time.monotonic() > deadline - CELL_S:
            report["not_run"].append(asdict(shape))
            continue
        cell = run_cell(shape, device, dtype, copied.gb_per_s, 5 if dry_run else 41)
        report["cells"].append(cell)
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(row(shape, cell), flush=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    if report["not_run"]:
        print(f"{len(report['not_run'])} shapes were not run: the time was up")


def run_cell(
    shape: DecodeShape, device: str, dtype: torch.dtype, copied: float, samples: int
) -> Report:
    cell: Report = {"shape": asdict(shape), "kept_pages": shape.kept_pages}
    try:
        inputs = decode_inputs(shape, device, dtype)
        dense, sdpa = sparse_decode.dense_case(inputs), sparse_decode.sdpa_case(inputs)
        ours, torchs = dense.call(), sdpa.call()
        assert isinstance(ours, torch.Tensor)
        assert isinstance(torchs, torch.Tensor)
        cell["dense_kernel_minus_sdpa"] = float((ours - torchs).abs().max())
        del dense, sdpa
        timings = [measure(case(inputs), samples) for case in CASES]
        if flash3.absent() is None:
            cell["fa3_minus_sparse_decode"] = fa3_differences(inputs)
            timings += [measure(case(inputs), samples) for case in sparse_decode.FA3_CASES]
    except Exception as error:  # the cells before and after it are worth keeping
        return cell | {"error": f"{type(error).__name__}: {error}"}
    cell["timings"] = {
        t.name: asdict(t) | {"of_copy_bandwidth": t.gb_per_s / copied} for t in timings
    }
    median = {t.name: t.median_us for t in timings}
    cell["speedup"] = {b: median[b] / median["chain"] for b in sparse_decode.BASELINES}
    return cell


def fa3_differences(inputs: DecodeInputs) -> dict[str, float]:
    """Largest differences of FlashAttention 3's outputs from our kernel's over the same tokens."""
    found = {}
    for build in sparse_decode.FA3_CASES:
        case = build(inputs)
        same = sparse_decode.dense_case if case.name == "fa3_dense" else sparse_decode.case
        theirs, ours = case.call(), same(inputs).call()
        assert isinstance(theirs, torch.Tensor)
        assert isinstance(ours, torch.Tensor)
        found[case.name] = float((theirs - ours).abs().max())
    return found


COLUMNS = (
    "page_digest", "page_bound", "page_select", "sparse_decode", "chain", "dense_kernel",
    "dense_sdpa", "pack_tokens", "key_codes", "code_logits", "token_select", "token_chain",
    "encode_pages", "decode_pages", "coded_decode", "coded_dense",
)  # fmt: skip


def header() -> str:
    names = " ".join(f"{name:>13}" for name in COLUMNS)
    return f"{'median us (share of copy bandwidth)':44} {names}   vs kernel, sdpa"


def row(shape: DecodeShape, cell: Report) -> str:
    if "error" in cell:
        return f"{describe(shape):44} {cell['error'][:100]}"
    timings = [cell["timings"][name] for name in COLUMNS]
    times = " ".join(f"{t['median_us']:7.1f} {t['of_copy_bandwidth']:5.0%}" for t in timings)
    ratios = ", ".join(f"{ratio:.2f}x" for ratio in cell["speedup"].values())
    fa3 = [t for name, t in cell["timings"].items() if name.startswith("fa3")]
    more = "".join(f"  {t['name']} {t['median_us']:.1f} {t['of_copy_bandwidth']:.0%}" for t in fa3)
    return f"{describe(shape):44} {times}   {ratios}{more}"


if __name__ == "__main__":
    sys.exit(main())
