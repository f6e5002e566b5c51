"""docs/new-method.ipynb runs, cell after cell, with nothing but what is installed here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "docs/new-method.ipynb").read_text())
SHELL = re.compile(r"^!(.*)$", re.M)


def test_it_is_a_notebook_without_what_it_once_printed():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(600)
def test_it_runs(tmp_path):
    """As IPython does it: a line behind ! is a shell's, and here one that fails ends it."""
    cells = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]
    shell = r"__import__('subprocess').run(r'''\1''', shell=True, check=True)"
    script = "\n\n".join(SHELL.sub(shell, cell) for cell in cells)
    (commands := tmp_path / "bin").mkdir()
    main = "-c 'from kvplug.cli import main; main()'"
    for name, given in {"kvplug": main, "pip": "-m pip", "python": ""}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {given} "$@"\n')
        (commands / name).chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    place = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "evals")))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": place, "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "40 of 40 right" in done.stdout, done.stdout
    reads = re.findall(r"(\d+)% read", done.stdout)
    assert reads[0] == "100"
    assert int(reads[-1]) < 50
