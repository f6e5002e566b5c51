"""What counts and what is said, and nothing that is served depends on, in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.nursery import TORCH, open_nursery

COUNT = """
import resource
from kvplug import Event
from kvplug_sglang.metrics import Metrics
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

def count():
    metrics = Metrics("dense")
    for n in range(40):
        event = Event(
            row=0, era=0, private=0, pages=range(2), tokens=64, kept=1, stay=32, protect=(),
            phase=0,
        )
        metrics.count_packed(f"snapkv(budget={n})", event, 1.0)
    metrics.count_whole()

def page(folder):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)
    return generate_latest(registry).decode()
"""


def said(code: str, **environment: str) -> str:
    with open_nursery(TORCH):
        done = subprocess.run(
            [sys.executable, "-c", COUNT + code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("limit", [0, 600, 5000])
def test_a_full_disk_ends_the_counting_and_nothing_else(tmp_path, limit):
    code = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
count()
assert "kvplug" not in page({str(tmp_path)!r})
"""
    log = said(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert log.count("stopped counting") == 1


def test_what_was_counted_is_on_sglangs_page(tmp_path):
    code = f"""
count()
shown = page({str(tmp_path)!r})
assert 'kvplug_packed_prompts_total{{policy="snapkv(budget=7)"}} 1.0' in shown
assert 'kvplug_packed_prompts_total{{policy="dense"}} 0.0' in shown
assert "kvplug_whole_prompts_total 1.0" in shown
"""
    assert not said(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))


def test_a_policy_that_nobody_applies_is_said():
    code = """
import kvplug_sglang.command_line as command_line
command_line.compat.selected = lambda server_args: False
command_line.settle(None, None)
command_line.settle(None, None)
"""
    log = said(code, KVPLUG_POLICY="nonsense")
    needs = "KVPLUG_POLICY=nonsense needs --attention-backend kvplug"
    assert log.splitlines() == [f"kvplug: without effect: {needs}"]
    assert not said(code, KVPLUG_POLICY="")
