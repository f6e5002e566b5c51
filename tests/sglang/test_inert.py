"""Installed but not selected, nothing changes; selected but dense, it is the stock engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCRIPT = """
import json, os, sys
from pathlib import Path

from conftest import start

model, prompts, out = sys.argv[1:]


def served(policy=None):
    with start(Path(model), policy) as engine:
        return {
            "tokens": engine.generate(json.loads(prompts), 16),
            "backend": type(engine.backend).__module__,
            "total": engine.scheduler.max_total_num_tokens,
            "free": engine.free,
        }


def hooked():
    from kvplug_sglang import compat, hooks

    return [h.target for h in hooks.HOOKS if compat._placed(h, compat._lookup(h)[1])]


absent = served()
loaded = [name for name in sys.modules if name.startswith("kvplug_sglang")]

from sglang.srt import plugins

del os.environ["SGLANG_PLUGINS"]
plugins._plugins_loaded = False
idle = served()
before = hooked()
dense = served("dense")
Path(out).write_text(json.dumps([loaded, absent, idle, before, dense, hooked()]))
"""


def test_installed_but_not_selected_changes_nothing(random_llama, prompts, tmp_path):
    """One process, which SGLang's own list of plugins keeps from kvplug at first: it might as well
    not be installed."""
    out = tmp_path / "served.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(random_llama()),
         json.dumps(prompts(400, 90, 1, seed=18)), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SGLANG_PLUGINS": "none"},
        capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    loaded, absent, idle, before, dense, hooked = json.loads(out.read_text())
    assert loaded == []
    assert absent["backend"] == "sglang.srt.layers.attention.torch_native_backend"
    assert idle == absent
    assert before == []
    assert hooked, "selected, it stands beside the scheduler"
    assert dense == {**absent, "backend": "kvplug_sglang.cpu"}
