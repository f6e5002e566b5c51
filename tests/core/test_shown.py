"""Every table can be had as JSON, and nothing else is then written to standard output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

typer = pytest.importorskip("typer")
testing = pytest.importorskip("typer.testing")

from rich.console import Console  # noqa: E402

from kvplug.cli import app as core  # noqa: E402
from kvplug.shown import STDOUT, progress, screen, write_json  # noqa: E402

ROOT = Path(__file__).parents[2]
WITHOUT = {"new-method"}  # names the files that it writes


def test_every_command_has_the_option():
    pytest.importorskip("lm_eval")
    from kvplug_evals.cli import app as evals

    def commands(group, before=()):
        for name, command in getattr(group, "commands", {}).items():
            yield from commands(command, (*before, name))
            if not hasattr(command, "commands"):
                yield " ".join((*before, name)), {o for p in command.params for o in p.opts}

    found = dict(commands(typer.main.get_command(core)))
    found |= dict(commands(typer.main.get_command(evals)))
    assert {"plan", "doctor", "bench serve", "demo", "eval", "calibrate", "xray"} <= set(found)
    assert {name for name, options in found.items() if "--json" not in options} == WITHOUT


def test_a_file_or_standard_output(tmp_path, capsys):
    write_json({"a": Path("b")}, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": "b"}
    write_json({"a": 1}, None)
    assert capsys.readouterr().out == ""
    write_json({"a": 1}, STDOUT)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_a_file_that_cannot_be_is_refused_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError), screen(tmp_path / "no" / "out.json"):
        raise AssertionError("the work began")


PRINTS = """
import subprocess, sys
from kvplug.shown import STDOUT, screen, write_json
with screen(STDOUT) as console:
    console.print("a table")
    print("an engine")
    subprocess.run([sys.executable, "-c", "print('its process')"], check=True)
write_json([1], STDOUT)
"""


def test_what_else_is_printed_goes_to_standard_error():
    run = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, text=True, cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert json.loads(run.stdout) == [1]
    assert all(said in run.stderr for said in ("a table", "an engine", "its process"))


def test_plan_writes_a_file_and_its_table(tmp_path):
    config = {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    }  # fmt: skip
    (model := tmp_path / "config.json").write_text(json.dumps(config))
    asked = ["plan", str(model), "--gpu", "h100", "--json", str(tmp_path / "plan.json")]
    shown = testing.CliRunner().invoke(core, asked)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["best"] in shown.output.replace("\n", "")


def test_long_work_says_what_is_left():
    with (tmp := Console(force_terminal=True, record=True, width=100)), progress(tmp, 4) as bar:
        bar.say("layers")
        bar.advance(3)
        bar.reach(2, 8)
        bar._progress.refresh()
    assert "layers" in (text := tmp.export_text())
    assert "2/8" in text
    assert "left" in text
