"""Each engine of a process judges its own requests, and its core judges once more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SERVED = ["length", 8]


@pytest.mark.engine
@pytest.mark.timeout(500)
def test_of_three_engines_each_judges_by_its_own_offer(random_llama):
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.three_engines", str(random_llama())],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True, text=True, timeout=480,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["first"][0] == [SERVED]
    assert "does not allow quest. Known: dense, snapkv." in found["first"][1]
    assert "does not allow snapkv" in found["second"][0]
    assert "Known: dense, quest." in found["second"][0]
    assert found["second"][1] == [SERVED]
    assert all("was started without it" in said for said in found["stock"])
    # What reaches a core all the same fails alone there.
    assert found["let through"] == [SERVED, ["error", 0], SERVED]
    assert found["later"] == [SERVED]
