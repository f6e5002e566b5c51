"""SGLang's own test kit for attention backends, whole, over both of the wrapped backends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KIT = Path(__file__).with_name("kit.py")
CASES = 12
DENSE = "dense"
SELECTED = '{"policy": "quest(budget=4096, dense_layers=0)", "shortcut": false}'
STREAMED = '{"policy": "streaming_llm(window=4096)", "shortcut": false}'
BOTH = (
    '{"policy": "streaming_llm(window=4096) + quest(budget=4096, dense_layers=0)", '
    '"shortcut": false}'
)


@pytest.mark.parametrize("interpreted", [False, True], ids=["torch_native", "triton"])
def test_the_kit_is_green(interpreted):
    """In a process of its own: the kit replaces SGLang's idea of the world when it is imported."""
    policies = [DENSE, SELECTED, STREAMED, BOTH]
    triton = {"TRITON_INTERPRET": "1"} if interpreted else {}
    done = subprocess.run(
        [sys.executable, str(KIT), *policies],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **triton},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    selected = json.loads(done.stdout.splitlines()[-1])
    assert len(selected) == CASES * len(policies)
    for case, queries in selected.items():
        selects = "quest" in case and "decode" in case
        assert bool(queries) == selects, f"{case} selected for {queries} queries"
