"""Models that are not one plain Llama on one device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import heads
from tests.pace import Pace

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

FULL = ["dense", "quest(budget=4096, dense_layers=0)", "streaming_llm(sinks=4, window=4096)"]
SMALL = [
    "quest(budget=96, dense_layers=0)",
    "streaming_llm(sinks=4, window=100)",
    "streaming_llm(sinks=40, window=150) + quest(budget=96, dense_layers=0)",
    "snapkv(budget=96)",
    "random(budget=96) + quest(budget=64, dense_layers=0)",
    # Not of knorm: Gemma 3 normalises its keys, and an untrained one's all have the same norm.
    "pyramid(snapkv(budget=128, window=32), beta=4)",
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Two windowed layers and two global ones, interleaved."""
    from kvplug_evals.models.random_llama import build_random_gemma3

    folder = tmp_path_factory.mktemp("model") / "gemma"
    build_random_gemma3(folder)
    return folder


BY_HEAD = ["xattention(threshold=0.6, sinks=32)", "keydiff(budget=96, chunk=64)"]
"""Each KV head chooses for itself, while a prompt comes."""
LOCAL = 'local(layers="1", window=100) + quest(budget=96, dense_layers=0)'
CODED = "kivi(bits=8, first=1, bits_first=4) + twilight(budget=0.4, bits=8, dense_layers=1)"


def turns(engine, prompts):
    first = prompts(600, 430, 33, 1)
    second = [prompt + first[1][:90] for prompt in first]
    return engine.generate(first, 12), engine.generate(second, 12)


def test_windowed_layers_stay_stock_and_global_ones_are_planned(engine, gemma, prompts):
    with engine(gemma) as stock:
        expected = turns(stock, prompts)
    for policy in FULL:
        with engine(gemma, {"policy": policy}) as planned:
            assert [impl.planned for impl in planned.impls] == [False, True, False, True]
            assert turns(planned, prompts) == expected
            planned.forget()
            planned.without_shortcut()
            assert turns(planned, prompts) == expected
            if "quest" in policy:
                decoded = 2 * 4 * 11
                assert planned.selected == [0, decoded, 0, decoded]


@pytest.mark.parametrize("policy", SMALL)
def test_small_budgets_beside_windowed_layers_answer_as_alone(engine, gemma, prompts, policy):
    batch = prompts(600, 430, 33, 1)
    with engine(gemma, {"policy": policy}) as planned:
        alone = []
        for prompt in batch:
            planned.forget()
            alone += planned.generate([prompt], 12)
        planned.forget()
        free = planned.free_blocks
        assert planned.generate(batch, 12) == alone
        assert planned.generate(batch, 12) == alone, "from the prefix cache"
        planned.forget()
        assert planned.free_blocks == free


@pytest.mark.timeout(1200)
@pytest.mark.cpu
def test_two_ranks_answer_as_one(random_llama, prompts, tmp_path):
    """8 query and 2 KV heads: each rank selects for one KV head, and counts agree."""
    import json
    import subprocess
    import sys
    from pathlib import Path

    model = random_llama(heads=8, kv_heads=2)
    script = Path(__file__).with_name("two_ranks.py")
    alone = [line for line in SMALL if line.startswith(("streaming_llm", "pyramid"))]
    mixed = {
        "kvplug": {
            "policy": "dense",
            "allow": ["quest", "snapkv", "random", "keydiff", "xattention"],
            "max_budget": 96,
        },
        "asks": [None, *(line for line in SMALL if line not in alone), *BY_HEAD],
    }
    forced = {"policy": "twilight(budget=1.0, dense_layers=0)", "shortcut": False}
    shape = replace(heads.LLAMA, heads=8)
    best = {0: [heads.B] * 4 + [heads.A] * 4, 1: [heads.C] * 4 + [heads.B] * 4}
    by_kind = heads.line(tmp_path, best, shape)
    jobs = {
        "servers": [
            mixed,
            {"kvplug": forced, "asks": [None]},
            {"kvplug": {"policy": by_kind}, "asks": [None]},
            *({"kvplug": {"policy": line}, "asks": [None]} for line in alone if "pyramid" in line),
            {"kvplug": {"policy": LOCAL}, "asks": [None]},
            {"kvplug": {"policy": CODED}, "asks": [None]},
        ],
        "prompts": prompts(600, 430, 33, 1),
        "tokens": 12,
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    answers = []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        command = [sys.executable, script, model, tmp_path / "jobs.json", str(ranks), output]
        Pace.starts += len(jobs["servers"])
        done = subprocess.run(command, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        answers.append(json.loads(output.read_text()))
    assert answers[0] == answers[1]
    # Workers of their own run the compiled selection, here with everything going through it.
    dense, *others = (answers[0][0][n : n + 4] for n in range(0, len(answers[0][0]), 4))
    assert answers[0][1] == dense
    assert answers[0][2] != dense
    assert dense not in others, "budgets were small enough to matter"
    assert len(others) == len(mixed["asks"]) - 1
