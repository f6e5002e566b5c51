"""The same prompts, policies and model in vLLM and in SGLang: the same tokens come out.

What a head keeps or reads decides every later token of a model whose answers follow from the whole
context, so equal answers mean equal choices, per head and layer. Page size 32 in both, fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

VLLM = Path(__file__).parents[2] / ".venvs" / "vllm" / "bin" / "python"
POLICIES = [
    "snapkv(budget=128)",
    "knorm(budget=128)",
    "random(budget=128)",
    "keydiff(budget=128)",
    "streaming_llm(window=200)",
    "quest(budget=128, dense_layers=0)",
    "twilight(budget=0.2, dense_layers=0)",
    "snapkv(budget=256, window=40) + twilight(budget=80, top_p=0.9, dense_layers=0)",
    "snapkv(budget=256, window=40) + quest(budget=96, dense_layers=0)",
    "streaming_llm(window=300) + quest(budget=96, dense_layers=1)",
    "pyramid(snapkv(budget=128), beta=20) + quest(budget=96, dense_layers=0)",
    "kivi(bits=4)",
    "kivi(bits=8) + snapkv(budget=256, window=40) + twilight(budget=0.2, bits=8, dense_layers=0)",
]


def test_both_engines_choose_alike(engine, random_llama, prompts):
    model, batch = random_llama(), prompts(900, 530, 160, 96, 33, 1, seed=20)
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(VLLM), str(Path(__file__).with_name("in_vllm.py")), str(model), json.dumps(batch),
         *POLICIES],
        env=plain, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    in_vllm = json.loads(done.stdout.splitlines()[-1])
    answers = alike = 0
    for policy in POLICIES:
        with engine(model, policy, page_size=32) as planned:
            in_sglang = planned.generate(batch, 16)
        answers += len(batch)
        alike += sum(a == b for a, b in zip(in_sglang, in_vllm[policy], strict=True))
    assert len({json.dumps(each) for each in in_vllm.values()}) == len(POLICIES)
    assert alike >= answers - 1, f"{alike} of {answers} answers are alike"
