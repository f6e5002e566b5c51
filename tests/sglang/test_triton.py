"""The backend that serves GPUs, Triton, run by its interpreter, answers as the CPU's does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

POLICIES = [
    "quest(budget=48, dense_layers=1)",
    "snapkv(budget=48, window=16)",
    "streaming_llm(sinks=16, window=64)",
    "keydiff(budget=64) + quest(budget=48, dense_layers=0)",
    "streaming_llm(window=64) + quest(budget=48, top_p=0.9, dense_layers=0)",
]


def test_triton_answers_as_torch_native(engine, random_llama, prompts):
    """Chunk 64, page size 16: prefill over holes, packing, selection, ragged batches."""
    model, batch = random_llama(), prompts(150, 97, 1, seed=21)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("serve_once.py")), str(model),
         json.dumps(batch), "4", *POLICIES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    backend, interpreted = json.loads(done.stdout.splitlines()[-1])
    assert backend == "kvplug_sglang.cuda_triton"
    for policy in POLICIES:
        with engine(model, policy, chunked_prefill_size=64) as native:
            assert native.generate(batch, 4) == interpreted[policy], policy
