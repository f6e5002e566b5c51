"""Everything that a GPU can show, in one command of under nine minutes: what `make gpu` runs.

    PYTHONPATH=kernels:. python3 tools/gpu_engines.py --out results/gpu [--bundle FOLDER]

The kernels' suite (kvplug_kernels.gpu_suite) always; whole vLLM engines too where the folder holds
what tools/gpu_bundle.py made, or where vLLM is installed. Each item is named before it starts and
ended when its time is up; DIR/engines.json is written anew after each, so that a run cut short
keeps what it learnt. Exits with 0 when everything ran and passed, else with 1, and with 2 without
a CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
TESTS = PROJECT / "tests/gpu/test_engines.py"
TOTAL_S = 530.0
SPARE_S = 5.0  # of an item that keeps to a time of its own
IMPORTS = """
import torch, vllm, vllm._C_stable_libtorch
from vllm.platforms import current_platform
import vllm.vllm_flash_attn.flash_attn_interface as flash
print("torch", torch.__version__, "vllm", vllm.__version__, "on", current_platform.device_type,
      "FlashAttention 3:", flash.FA3_AVAILABLE, flash.FA3_UNAVAILABLE_REASON)
assert flash.FA3_AVAILABLE or torch.cuda.get_device_capability()[0] != 9
"""


@dataclass(frozen=True)
class Item:
    """Something to run, and how long it may take."""

    name: str
    shows: str
    seconds: float
    command: tuple[str, ...]


@dataclass
class Outcome:
    name: str
    shows: str
    state: str
    """passed, failed, out of time, not run"""
    seconds: float = 0.0
    said: str = ""
    """The last lines, where it did not pass."""
    measured: dict[str, Any] = field(default_factory=dict)


def items(out: Path, engines: bool) -> list[Item]:
    """In the order in which they tell most."""
    python, junit = sys.executable, str(out / "{name}.xml")
    suite = (python, "-m", "kvplug_kernels.gpu_suite", "--out", str(out), "--budget", "{budget}")
    if not engines:
        return [
            Item("kernels", "the kernels against their references, then their times", 520, suite)
        ]

    def test(name: str, shows: str, seconds: float) -> Item:
        command = (python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "default")
        return Item(
            name, shows, seconds, (*command, f"--junitxml={junit}", f"{TESTS}::test_{name}")
        )

    return [
        Item("imports", "vLLM's compiled operators load", 40, (python, "-c", IMPORTS)),
        Item("kernels", "the kernels against their references, then their times", 150, suite),
        test("full_budget_equals_stock", "eager, every policy with the whole cache as budget", 60),
        test("replayed_batches_equal_eager", "graphs with 1, 2, 3, 5 and 9 requests", 80),
        test(
            "long_decode_beside_chunked_prefill", "20,000 tokens decode, another is prefilled", 60
        ),
        test(
            "one_token_last_chunk_keeps_its_question", "snapkv, a prompt of k chunks and one", 40
        ),
        test("mixed_steps_take_no_more_memory", "200 steps of changing shapes", 50),
        test("decode_times", "dense and quest at 8K, 32K and 128K, an 8B model's attention", 90),
    ]


def run_all(
    wanted: Sequence[Item],
    total: float,
    file: Path,
    report: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Each item within its own time and what is left of the total; `file` after each."""
    deadline = clock() + total
    outcomes: list[Outcome] = []
    for item in wanted:
        left = deadline - clock()
        if left < item.seconds / 2:  # it would be ended in its midst: let a shorter one run
            print(f"{item.name}: not run, {max(left, 0):.0f} s are left", flush=True)
            outcomes.append(Outcome(item.name, item.shows, "not run"))
        else:
            seconds = min(item.seconds, left)
            print(f"{item.name}: {item.shows} (at most {seconds:.0f} s)", flush=True)
            outcomes.append(run_one(item, seconds, file.parent, clock))
            last = outcomes[-1]
            print(
                f"{item.name}: {last.state}, {last.seconds:.0f} s {last.measured or ''}",
                flush=True,
            )
        report["engines"] = [asdict(outcome) for outcome in outcomes]
        file.write_text(json.dumps(report, indent=1) + "\n")
    return outcomes


def run_one(item: Item, seconds: float, out: Path, clock: Callable[[], float]) -> Outcome:
    junit = out / f"{item.name}.xml"
    junit.unlink(missing_ok=True)
    command = [
        part.replace("{name}", item.name).replace("{budget}", f"{seconds - SPARE_S:.0f}")
        for part in item.command
    ]
    began = clock()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            state = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it started goes too
            process.wait()
            state = "out of time"
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    outcome = Outcome(item.name, item.shows, state, clock() - began)
    if junit.exists():
        tree = ElementTree.parse(junit)
        outcome.measured = {
            entry.attrib["name"]: entry.attrib["value"] for entry in tree.iter("property")
        }
        if state == "passed" and any(True for _ in tree.iter("skipped")):
            outcome.state = "not run"  # pytest counts what it skips as success
        junit.unlink()
    if outcome.state != "passed":
        outcome.said = "\n".join(lines[-40:])
        print(outcome.said, flush=True)
    elif item.name in ("imports", "kernels"):
        print("\n".join(lines), flush=True)
    return outcome


def find_engine(bundle: Path, into: Path) -> list[Path] | None:
    """What to put on the path for vLLM; None where there is none."""
    if (bundle / "bundle.json").exists():
        from gpu_bundle import unpack

        print(f"unpacking {bundle}", flush=True)
        return unpack(bundle, into)
    return [] if importlib.util.find_spec("vllm") else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--bundle", type=Path, default=PROJECT / ".cache" / "gpu-bundle")
    parser.add_argument("--total", type=float, default=TOTAL_S, help="seconds for everything")
    options = parser.parse_args(arguments)
    began, out = time.monotonic(), options.out.absolute()
    import torch

    from kvplug_kernels.gpu_suite import NO_DEVICE, provenance

    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = find_engine(options.bundle, Path(folder))
        if path is None:
            print(f"no engine: no vLLM is installed, and {options.bundle} holds no bundle of it")
        before = os.environ.get("PYTHONPATH", "")
        ours = [PROJECT / "kernels", PROJECT / "evals", PROJECT, *(path or [])]
        os.environ.update(
            PYTHONPATH=os.pathsep.join([*map(str, ours), before]),
            HF_HUB_OFFLINE="1",
            VLLM_NO_USAGE_STATS="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_USE_FLASHINFER_SAMPLER="0",
        )
        left = options.total - (time.monotonic() - began)
        report = provenance(None) | {"bundle": path is not None and bool(path)}
        outcomes = run_all(items(out, path is not None), left, out / "engines.json", report)
    print(f"wrote {out / 'engines.json'}")
    return int(any(outcome.state != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
