"""Installed but not selected, nothing changes; selected but dense, it is the stock engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SCRIPT = """
import json, sys
from pathlib import Path

from conftest import start

model, prompts, out, policy = sys.argv[1:]
with start(Path(model), policy or None) as engine:
    tokens = engine.generate(json.loads(prompts), 16)
    from kvplug_sglang import compat, hooks

    Path(out).write_text(json.dumps({
        "hooked": [h.target for h in hooks.HOOKS if compat._placed(h, compat._lookup(h)[1])],
        "backend": type(engine.backend).__module__,
        "total": engine.scheduler.max_total_num_tokens,
        "free": engine.free,
        "tokens": tokens,
    }))
"""


def served(tmp_path, model, prompts, *, installed: bool = True, policy: str = "") -> dict:
    out = tmp_path / f"{installed}-{policy}.json"
    # SGLANG_PLUGINS is SGLang's own allow-list: kvplug might as well not be installed.
    plugins = {} if installed else {"SGLANG_PLUGINS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), json.dumps(prompts), str(out), policy],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **plugins},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(Path(out).read_text())


def test_installed_but_not_selected_changes_nothing(random_llama, prompts, tmp_path):
    model, batch = random_llama(), prompts(400, 90, 1, seed=18)
    absent = served(tmp_path, model, batch, installed=False)
    idle = served(tmp_path, model, batch)
    dense = served(tmp_path, model, batch, policy="dense")
    assert absent["backend"] == "sglang.srt.layers.attention.torch_native_backend"
    assert absent["hooked"] == []
    assert idle == absent
    assert dense["hooked"], "selected, it stands beside the scheduler"
    assert dense == {**absent, "backend": "kvplug_sglang.cpu", "hooked": dense["hooked"]}
