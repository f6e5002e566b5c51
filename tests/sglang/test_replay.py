"""Decode steps under SGLang's own graph runner, recorded on the CPU and replayed.

The runner, its padding and its view of a batch are SGLang's; ``recorded_graph`` stands for the
CUDA graph alone. Replays must answer as the eager CPU backend does, and really replay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from tests import heads

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NEW = 3
ALONE = [None] * 3
MIXED = '{"policy": "dense", "allow": ["snapkv", "knorm", "quest"], "max_budget": 96}'
SELECTING = (
    '{"policy": "quest(budget=48, dense_layers=1)", "allow": ["snapkv", "quest"], '
    '"max_budget": 64, "min_context": 120}'
)
NAMING = "of named chunks"
CASES = {
    "dense": ("dense", ALONE),
    "short, selecting": ("quest(budget=48, dense_layers=1)", ALONE),
    "by mass": ("streaming_llm(window=64) + quest(budget=64, top_p=0.9, dense_layers=0)", ALONE),
    "by tokens": ("twilight(budget=40, dense_layers=0)", ALONE),
    "evicting": ("streaming_llm(sinks=16, window=64)", ALONE),
    "compressing": ("snapkv(budget=48, window=16)", ALONE),
    "both": ("keydiff(budget=64) + quest(budget=48, dense_layers=1)", ALONE),
    "pyramid": (
        "pyramid(snapkv(budget=64, window=16), beta=4) + quest(budget=32, dense_layers=1)", ALONE
    ),
    "blocks": (
        "xattention(threshold=0.6, sinks=16, block=32, last=8) + quest(budget=48, dense_layers=1)",
        ALONE,
    ),
    "of their own": (MIXED, ["snapkv(budget=48, window=16)", None, "knorm(budget=96)"]),
    "in codes": ("kivi(bits=4)", ALONE),
    "in codes, packed and selecting": (
        "snapkv(budget=64, window=16) + kivi(bits=8) + "
        "twilight(budget=40, bits=8, dense_layers=1)",
        ALONE,
    ),
    NAMING: ("blend(links=8)", ['{"chunks": [[0, 97], [97, 247]]}', None, None]),
    "by head": (
        "duo(snapkv(budget=64, window=16), heads={heads!r}, retrieval=0.5, sink=8, recent=20)",
        ALONE,
    ),
    "as the server selects": (
        SELECTING, ["snapkv(budget=64, window=16) + quest(budget=48, dense_layers=1)", None, None]
    ),
}  # fmt: skip
OTHERWISE = {
    "in another way": (MIXED, ["quest(budget=32, dense_layers=1)", None, None]),
    "with another budget": (SELECTING, [None, "quest(budget=32, dense_layers=1)", None]),
}


BEFORE = {NAMING: (97, 150)}
"""Tokens of prompts that are served before; their chunks are the first request's."""
PAGES = {name: 32 if name.startswith("in codes") else 16 for name in {**CASES, **OTHERWISE}}

IN_TRITON = ("by mass", "by tokens", "both", "of their own", "by head", "in another way")
"""What its kernels are called with: the rest is the same over FlashAttention 3, in less time."""
INTERPRETED = {("triton", name) for name in IN_TRITON} | {
    ("flash", "blocks"),
    ("flash", "in codes, packed and selecting"),
}
"""With kvplug's own kernels, each of which is in one of these; with their references elsewhere."""
SERVED = [("triton", name) for name in IN_TRITON]
SERVED += [("flash", name) for name in {**CASES, **OTHERWISE}]


@pytest.fixture(scope="module")
def replayed(eager):
    """One process for all, of SERVED: (stock, case) -> what it did."""
    model, cases, batches, _ = eager
    jobs = [
        [stock, (stock, name) in INTERPRETED, *cases[name], PAGES[name], *batches[name]]
        for stock, name in SERVED
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("replay_once.py")), str(model), str(NEW),
         *map(json.dumps, jobs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(zip(SERVED, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def eager(engine, random_llama, prompts, tmp_path_factory):
    """What the CPU backend answers: prompts of three requests, two layers, chunk 64, page 16.
    -> model, cases, (what is served before, the prompts) by case, answers by case"""
    model, plain = random_llama(), prompts(150, 97, 1, seed=21)
    file = tmp_path_factory.mktemp("heads") / "heads.json"
    heads.losing({0: [0.9, 0.1], 1: [0.1, 0.9]}).save(file)
    cases = {**CASES, **OTHERWISE}
    cases["by head"] = cases["by head"][0].format(heads=str(file)), ALONE
    answers, batches = {}, {}
    for name, (settings, chosen) in cases.items():
        before = prompts(*BEFORE.get(name, ()), seed=22)
        batch = [[*chain(*before), 5], *plain[1:]] if before else plain
        batches[name] = before, batch
        options = {"chunked_prefill_size": 64, "page_size": PAGES[name]}
        with engine(model, settings, **options) as eager:
            eager.generate(before, 1)
            rids = [eager.send(p, NEW, policy) for p, policy in zip(batch, chosen, strict=True)]
            eager.drain()
            answers[name] = [eager.output(rid) for rid in rids]
    return model, cases, batches, answers


@pytest.mark.parametrize("stock", ["triton", "flash"])
def test_replayed_steps_answer_as_eager_ones(eager, replayed, stock):
    """Padded batches of three; FlashAttention 3 is held to its contract in each call."""
    *_, answers = eager
    for (over, name), found in replayed.items():
        if over != stock:
            continue
        assert found["backend"] == f"kvplug_sglang.cuda_{stock}", name
        assert found["waves"] == [answers[name], answers[name]], name
        replays = 0 if name in OTHERWISE else 2 * (NEW - 1)
        assert found["replays"] == replays, name
        chosen = {**CASES, **OTHERWISE}[name][1]
        own = 2 * sum(policy is None or "chunks" in policy for policy in chosen)
        assert found["counted"] == own * (NEW - 1), name
        if name == NAMING:
            assert found["cached"] == [96 + 128, 240], "taken, and its own as it was left"
