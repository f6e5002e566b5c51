"""What a server holds on to while its batches change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_steps_of_changing_shapes_leave_no_buffer_behind(random_llama):
    """200 steps, prefill among decodes that select and replay, over FlashAttention 3."""
    policy = "snapkv(budget=64, window=16) + quest(budget=48, dense_layers=1)"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("steps_once.py")),
         str(random_llama(layers=3)), policy],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["steps"].values()) >= 200
    assert min(found["steps"]["EXTEND"], found["replays"]) > 50
    assert len(found["warm"]) > 10
    assert found["after"] == found["warm"]
