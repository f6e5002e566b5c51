"""``--json`` of commands that measure: standard output has their figures alone, their tables and
what engines print go elsewhere; a file has the same figures."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("typer")
pytest.importorskip("lm_eval")
pytest.importorskip("vllm")  # without it bench measures nothing
pytest.importorskip("matplotlib")

from kvplug_evals.bench import cli, compression, decode, idle, serve
from kvplug_evals.bench.compression import Result, Steps
from kvplug_evals.bench.load import Sent
from kvplug_evals.bench.steps import Timed
from kvplug_evals.cli import app
from kvplug_evals.demo import session
from kvplug_evals.models.random_llama import build_random_llama
from kvplug_evals.xray import looks
from tests.evals.test_demo import row
from tests.evals.test_xray import drawn

NOISE = b"an engine prints\n"


@pytest.fixture
def figures(capfd, tmp_path, monkeypatch):
    """Runs a command twice -> figures of its standard output, and of a file, and what it said."""
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)

    def run(*words):
        app([*words, "--json", "-"], standalone_mode=False)
        printed = capfd.readouterr()
        app([*words, "--json", "figures.json"], standalone_mode=False)
        shown = capfd.readouterr()
        written = json.loads((tmp_path / "figures.json").read_text())
        return json.loads(printed.out), written, printed.err, shown.out

    yield run
    for name in set(os.environ) - set(environment):  # the benches set their engines'
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "llama"
    build_random_llama(folder)
    return str(folder)


def test_of_a_process_that_measures(figures, monkeypatch):
    def measured(command, env):
        os.write(1, NOISE)
        Path(json.loads(command[3])["out"]).write_text('{"cells": [1.5]}')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(cli, "subprocess", SimpleNamespace(run=measured))
    printed, written, said, shown = figures("bench", "attention", "--out", "cells.json")
    assert printed == written == {"cells": [1.5]}
    assert NOISE.decode() in said
    assert NOISE.decode() in shown


def test_of_bench_compression(figures, model, monkeypatch):
    dense = Steps(first_token=1000, packing=50, decode=50, packed=0)
    ours = Steps(first_token=1000, packing=90, decode=50, packed=2)
    result = Result(policy="knorm(budget=64)", pairs=[(dense, ours)] * 3)
    monkeypatch.setattr(compression, "measure", lambda *_: os.write(1, NOISE) and [result])
    asked = [
        "--policy",
        "knorm(budget=64)",
        "--model",
        model,
        "--tokens",
        "300",
        "--out",
        "c.json",
    ]
    printed, written, said, shown = figures("bench", "compression", *asked)
    for found in (printed, written):
        assert found["policies"][0]["cost_of_ttft"] == 0.04
    assert "knorm(budget=64)" in said
    assert NOISE.decode() in said
    assert "knorm(budget=64)" in shown


def test_of_bench_decode(figures, model, monkeypatch):
    class Answering:
        def ask(self, *prompts, policy=None):
            each = 50 + 0.01 * len(prompts) * len(prompts[0]) * (0.5 if policy else 1)
            return Timed(first_token=3000.0, behind=[each] * 12, packed=0)

    @contextmanager
    def engine(line, how):
        os.write(1, NOISE)
        yield Answering()

    monkeypatch.setattr(decode, "engine", engine)
    asked = [
        "--model",
        model,
        "--fit",
        "512",
        "--fit",
        "1024",
        "--judge",
        "768",
        "--out",
        "d.json",
    ]
    for name, budget in product(("quest", "twilight"), (0.125, 0.25)):
        asked += ["--policy", f"{name}(budget={budget}, dense_layers=0)"]
    printed, written, said, shown = figures("bench", "decode", *asked)
    for found in (printed, written):
        assert set(found["pace"]["methods"]) == {"quest", "twilight"}
        assert len(found["cells"]) == 5 * 5
    assert "Judged cells" in said
    assert NOISE.decode() in said
    assert "Judged cells" in shown


def test_of_bench_serve(figures, model, monkeypatch):
    def measured(line, place, run, console):
        os.write(1, NOISE)
        sent = Sent(output_tokens_per_second=2.0, ttft_ms=1, tpot_ms=5, itl_ms=1, replies=["a b"])
        yield serve.Cell(
            policy=line, load=serve.BATCH, sent=[sent], preempted=[0], peak=[7], read=1.0
        )

    monkeypatch.setattr(serve, "_measure", measured)
    asked = [
        "--model",
        model,
        "--policy",
        "quest(budget=64)",
        "--requests",
        "0",
        "--out",
        "s.json",
    ]
    printed, written, said, shown = figures("bench", "serve", *asked, "--batch", "2")
    for found in (printed, written):
        policies = [cell["policy"] for cell in found["cells"]]
        assert policies == ["dense", "quest(budget=64)"]
    assert NOISE.decode() in said
    for text in (said, shown):
        assert "cells give fewer tokens a second than dense" in " ".join(text.split())


def test_of_bench_idle(figures, model, monkeypatch):
    def measured(case, place, run):
        os.write(1, NOISE)
        return idle.Turns(
            held_mib=1, host_mib=0, room=0, cached=0.5, loaded_mib=0, ttft_ms=20, replies=["a b"]
        )

    monkeypatch.setattr(idle, "_measure", measured)
    asked = ["--model", model, "--case", "dense on kivi(bits=8)", "--out", "i.json"]
    printed, written, said, shown = figures("bench", "idle", *asked)
    for found in (printed, written):
        assert [server["case"] for server in found["servers"]] == [
            "dense",
            "dense on kivi(bits=8)",
        ]
    assert NOISE.decode() in said
    for text in (said, shown):
        assert "a second turn" in text


def test_of_the_demo(figures, model, monkeypatch):
    def conversed(line, *_):
        os.write(1, NOISE)
        return row(line, *((157, 4808) if line == "dense" else (157, 783)))

    monkeypatch.setattr(session, "_converse", conversed)
    asked = ["demo", "--model", model, "--policy", "quest(budget=512)", "--out", "out"]
    printed, written, said, shown = figures(*asked)
    for found in (printed, written):
        assert [each["policy"] for each in found["policies"]] == ["dense", "quest(budget=512)"]
        assert found["policies"][1]["tokens_read_per_step"] == 783
    assert NOISE.decode() in said
    for text in (said, shown):
        assert "Memory and reads" in text


def test_of_the_x_ray(figures, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a text")
    small = drawn(steps=2, layers=3, heads=2, prompt=64)
    monkeypatch.setattr(looks, "take", lambda *_: os.write(2, NOISE) and small)
    printed, written, _, shown = figures("xray", "--text", "text.txt", "--out", "page.html")
    for found in (printed, written):
        assert (found["tokens"], found["steps"], found["as_dense"]) == (64, 2, 1)
        assert found["bytes"] == len((tmp_path / "page.html").read_text())
        assert found["lost"] == pytest.approx(float(small.lost.mean()))
    assert "page.html" in shown
