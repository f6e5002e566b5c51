"""``kvplug eval`` through vLLM, as a user runs it: to its end, killed, and again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.pace import Pace

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
QUEST = "quest(budget=512, dense_layers=0)"
KVPLUG = [sys.executable, "-m", "kvplug_evals.cli"]


def start(*options: str, command: str = "eval") -> subprocess.Popen:
    """In float32: a CPU without instructions for bfloat16 takes eight times as long over it."""
    options = (*options, "--dtype", "float32") if command == "eval" else options
    Pace.starts += 1
    return subprocess.Popen(
        [*KVPLUG, command, *options],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*options: str) -> str:
    process = start(*options)
    said = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, said
    return said


def alive(group: int) -> list[str]:
    """Commands of a process group that are more than zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, pgid = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == group and state != "Z":
                found.append(stat.with_name("comm").read_text().strip())
    return found


def metrics(out: Path, policy: str) -> dict:
    """Of its setting with the most questions."""
    found = [
        json.loads(config.with_name("metrics.json").read_text())["kvplug_recall"]
        for config in out.glob("*/config.json")
        if json.loads(config.read_text())["policy"].startswith(policy)
    ]
    return max(found, key=lambda each: each["questions"])


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Of recall, with so many contexts of its six."""
    whole = (ROOT / "evals/suites/recall.yaml").read_text()
    assert "contexts: 6" in whole

    def write(contexts: int) -> str:
        file = tmp_path_factory.mktemp("suite") / f"{contexts}.yaml"
        file.write_text(whole.replace("contexts: 6", f"contexts: {contexts}"))
        return str(file)

    return write


@pytest.fixture(scope="module")
def out(tmp_path_factory, suite):
    out = tmp_path_factory.mktemp("eval")
    options = ["--engine", "vllm", "--model", "recall", "--mode", "multi-turn", "--in-process",
               "--out", str(out)]  # fmt: skip
    run(*options, "--suite", suite(3), "--policy", "dense", "--policy", QUEST)
    run(*options, "--suite", suite(2), "--policy", "quest(budget=1024)",
        "--policy", "snapkv(budget=512)", "--question", "aware", "--question", "agnostic",
        "--no-baselines")  # fmt: skip
    return out


def test_dense_recalls_everything_and_later_turns_hit_the_prefix_cache(out):
    dense = metrics(out, "dense")
    assert dense["fixed"] == 1.0
    assert dense["agreement"] == 1.0
    assert dense["loss"] < 0.01
    assert dense["questions"] == 15
    cached = [turn["cached_tokens"] for turn in dense["turns"]]
    assert cached[0] == 0
    assert all(tokens >= 2000 for tokens in cached[1:])


def test_the_numbers_are_what_they_were(out):
    """15 questions, greedy, fp32: only another order of sums may move them."""
    assert metrics(out, "quest(budget=512")["fixed"] == pytest.approx(0.33, abs=0.1)
    assert metrics(out, "random(budget=512")["fixed"] == pytest.approx(0.07, abs=0.1)
    assert metrics(out, "streaming_llm")["fixed"] == pytest.approx(0.08, abs=0.1)


def test_every_policy_read_or_held_less_or_is_marked_as_dense(out):
    dense, report = metrics(out, "dense"), (out / "report.md").read_text()
    for policy in ("random", "streaming_llm"):
        assert metrics(out, policy)["held_bytes"] < 0.7 * dense["held_bytes"]
    assert metrics(out, "quest(budget=512")["read_per_step"] < 0.3 * dense["read_per_step"]
    # Of the recall model's two layers quest leaves both dense, as its paper says.
    marked = [li for li in report.split("\n") if li.startswith("|") and "**= dense**" in li]
    assert {line.split("`")[1] for line in marked} == {"quest(budget=1024, dense_layers=2)"}
    for plot in out.glob("*.png"):
        assert f"]({plot.name})" in report


def test_a_policy_that_sees_the_question_keeps_what_it_asks_for(out):
    found = {}
    for directory in out.iterdir():
        config = directory / "config.json"
        if config.exists() and "snapkv" in directory.name:
            rows = (directory / "predictions.jsonl").read_text().splitlines()
            first = [json.loads(r)["prediction"].split()[:1] for r in rows]
            gold = [json.loads(r)["answer"].split()[:1] for r in rows]
            right = sum(a == b for a, b in zip(first, gold, strict=True)) / len(rows)
            found[json.loads(config.read_text())["question"]] = right
    assert found["aware"] > found["agnostic"] + 0.3


def test_conversations_start_cold_and_single_requests_find_their_context(tmp_path):
    """One engine for all four settings: what it still has of one must not flatter the next."""
    run("--suite", "smoke", "--policy", "dense", "--mode", "multi-turn", "--mode",
        "multi-request", "--question", "aware", "--question", "agnostic", "--no-baselines",
        "--in-process", "--out", str(tmp_path))  # fmt: skip
    seen = {}
    for config in tmp_path.glob("*/config.json"):
        what = json.loads(config.read_text())
        found = json.loads(config.with_name("metrics.json").read_text())["kvplug_recall"]
        cached = [turn["cached_tokens"] for turn in found["turns"]]
        seen.setdefault(what["mode"], []).append(cached)
    assert [first for first, _ in seen["multi-turn"]] == [0, 0]
    assert min(min(cached) for cached in seen["multi-request"]) >= 960
    assert min(later for _, later in seen["multi-turn"]) >= 960


def test_what_is_finished_is_not_run_again(out, suite):
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/predictions.jsonl")}
    said = run("--suite", suite(3), "--policy", QUEST, "--out", str(out))
    assert "4 of 4 settings are finished already" in said
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*/predictions.jsonl")}


def test_a_killed_sweep_loses_nothing_and_repeats_nothing(tmp_path, suite):
    options = ["--suite", suite(3), "--policy", "knorm(budget=512)", "--no-baselines"]
    options += ["--in-process", "--out", str(tmp_path)]
    process = start(*options)
    deadline = time.monotonic() + 300
    answered: list[str] = []
    while time.monotonic() < deadline and process.poll() is None:
        journals = list(tmp_path.glob("*dense*/journal.jsonl"))
        answered = journals[0].read_text().splitlines() if journals else []
        if len(answered) > 8:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (journal,) = tmp_path.glob("*dense*/journal.jsonl")
    kept = journal.read_text().splitlines()
    assert len(kept) > 8, "killed in the middle"
    assert not (journal.parent / "metrics.json").exists()

    run(*options)
    lines = journal.read_text().splitlines()
    whole = [line for line in kept if line.endswith("}}")]
    assert [json.loads(line) for line in lines[: len(whole)]] == [json.loads(w) for w in whole]
    keys = Counter(json.loads(line)["reply"]["key"] for line in lines if "reply" in line[:9])
    assert len(keys) == 30, "15 answers and 15 losses"
    assert set(keys.values()) == {1}
    assert metrics(tmp_path, "dense")["fixed"] == 1.0
    assert metrics(tmp_path, "knorm")["questions"] == 15


@pytest.mark.started
def test_interrupting_leaves_a_message_and_no_engine(tmp_path):
    process = start("--suite", "smoke", "--out", str(tmp_path))
    while not list(tmp_path.glob("*")) and process.poll() is None:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert "goes on from here" in said
    deadline = time.monotonic() + 60
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(process.pid)


@pytest.mark.started  # its server is known by its command line
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_demo_leaves_a_message_and_no_server(number, tmp_path):
    process = start("--model", ".models/recall", "--out", str(tmp_path), command="demo")
    log = tmp_path / "server-1.log"
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.05)
    words = log.read_text().split()
    port = words[words.index("--port") + 1]
    time.sleep(2)
    assert running(port)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert said.endswith("stopped; no server is left running\n")
    assert not running(port)


def running(argument: str) -> list[str]:
    """Processes with this on their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = line.read_text().split("\0")
            if argument in arguments:
                found.append(" ".join(arguments))
    return found
