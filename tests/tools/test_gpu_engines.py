"""What a machine without a GPU can prove of `make gpu`'s engines: order, time, results."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_engines  # noqa: E402
from gpu_engines import Item  # noqa: E402

PYTHON = sys.executable


def run(tmp_path, *wanted: Item, total: float = 60.0):
    report: dict = {"gpu": "none"}
    outcomes = gpu_engines.run_all(wanted, total, tmp_path / "engines.json", report)
    assert json.loads((tmp_path / "engines.json").read_text()) == report
    assert [entry["name"] for entry in report["engines"]] == [item.name for item in wanted]
    return outcomes


def item(name: str, code: str, seconds: float = 20) -> Item:
    return Item(name, "what it shows", seconds, (PYTHON, "-c", code))


def test_each_is_named_before_it_starts_and_the_next_runs_after_a_failure(tmp_path, capfd):
    one, two = run(
        tmp_path,
        item("one", "import sys; sys.exit('a reason')"),
        item("two", "import os; os.write(2, b'never shown')"),
    )
    assert (one.state, two.state) == ("failed", "passed")
    assert one.said == "a reason"
    out = capfd.readouterr().out
    places = [out.index(text) for text in ("one: what it shows", "a reason", "two: what it shows")]
    assert places == sorted(places)
    assert "never shown" not in out


def test_what_takes_too_long_is_ended(tmp_path):
    slow, quick = run(
        tmp_path, item("slow", "import time; time.sleep(60)", 1), item("quick", "pass")
    )
    assert slow.state == "out of time"
    assert 1 <= slow.seconds < 20
    assert quick.state == "passed"


def test_what_would_be_ended_in_its_midst_is_not_begun_and_shorter_ones_are(tmp_path, capfd):
    long, short = run(tmp_path, item("long", "pass", 100), item("short", "pass", 20), total=30)
    assert (long.state, short.state) == ("not run", "passed")
    assert "long: not run" in capfd.readouterr().out


def test_the_results_are_on_disk_while_the_next_one_runs(tmp_path):
    file = tmp_path / "engines.json"
    reads = f"import json; assert len(json.load(open({str(file)!r}))['engines']) == 1"
    _, second = run(tmp_path, item("first", "pass"), item("second", reads))
    assert second.state == "passed", second.said


@pytest.mark.parametrize("skips, state", [(False, "passed"), (True, "not run")])
def test_a_test_hands_over_what_it_measured_and_a_skipped_one_did_not_run(tmp_path, skips, state):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_it(record_property):\n"
        "    record_property('ms', 1.5)\n" + "    pytest.skip('no device')\n" * skips
    )
    command = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull)
    command += (f"--junitxml={tmp_path / '{name}.xml'}", str(tmp_path / "test_it.py"))
    (outcome,) = run(tmp_path, Item("measure", "a time", 60, command))
    assert (outcome.state, outcome.measured) == (state, {"ms": "1.5"})


def test_the_whole_list_ends_within_nine_minutes_and_names_tests_that_exist(tmp_path):
    wanted = gpu_engines.items(tmp_path, engines=True)
    assert gpu_engines.TOTAL_S < 540
    assert sum(item.seconds for item in wanted) <= 1.1 * gpu_engines.TOTAL_S
    assert [item.name for item in wanted[:2]] == ["imports", "kernels"]
    tests = {
        node.name.removeprefix("test_")
        for node in ast.parse(gpu_engines.TESTS.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert {item.name for item in wanted[2:]} == tests


def test_without_an_engine_the_kernels_have_all_the_time(tmp_path):
    (kernels,) = gpu_engines.items(tmp_path, engines=False)
    assert kernels.name == "kernels"
    assert kernels.seconds <= gpu_engines.TOTAL_S


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [PYTHON, ROOT / "tools/gpu_engines.py", "--out", tmp_path / "results"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "no CUDA device: nothing was run on a GPU"
    assert not (tmp_path / "results").exists()
