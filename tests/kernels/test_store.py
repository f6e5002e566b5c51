"""Compiled code outlives the process that compiled it, and never decides about an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

ROOT = Path(__file__).parents[2]
CODE = """
import numba, torch
from kvplug_kernels import cpu_memory
from kvplug_kernels.page_select import cpu

users = numba.config.CACHE_DIR
scores = torch.tensor([[[3.0, 1.0, 2.0, 0.0]]])
pages, keep = (torch.tensor([n], dtype=torch.int32) for n in (4, 2))
chosen, counts = cpu.page_select(scores, pages, keep, 2, 1)
assert (chosen.tolist(), counts.tolist()) == ([[[0, 3]]], [[2]])
assert numba.config.CACHE_DIR == users == "", "the user's own functions stay where they were"
stats = cpu.select.serial.stats
print(cpu_memory.store(), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def chosen(home: Path) -> tuple[str, int, int]:
    """The store that a fresh process had, and what it found in it and what not."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    folder, hits, misses = done.stdout.split()
    return folder, int(hits), int(misses)


def test_a_second_process_compiles_nothing(tmp_path):
    folder, *first = chosen(tmp_path)
    assert first == [0, 1]
    assert chosen(tmp_path) == (folder, 1, 0)
    for stored in Path(folder).rglob("*.nb?"):
        stored.write_bytes(stored.read_bytes()[:100])
    assert chosen(tmp_path)[0] == folder, "half a file is compiled again"


def test_without_a_folder_each_compiles_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    assert chosen(tmp_path / "file") == ("None", 0, 1)
