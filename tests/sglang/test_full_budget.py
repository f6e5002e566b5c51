"""With the whole cache as budget every policy is the stock engine, token for token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from conftest import free_port

from kvplug import parse
from tests import heads

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

POLICIES = [
    "dense",
    "quest(budget=4096, dense_layers=0)",
    "quest(budget=4096, top_p=1.0, dense_layers=0)",
    "streaming_llm(window=4096)",
    "snapkv(budget=4096)",
    "knorm(budget=4096)",
    "random(budget=4096)",
    "tova(interval=None, budget=4096)",
    "r_kv(interval=None, budget=4096)",
    "chunkkv(lagkv(budget=4096))",
    "vase(budget=4096)",
    "keydiff(budget=4096) + quest(budget=4096, dense_layers=0)",
    "streaming_llm(window=4096) + quest(budget=4096, dense_layers=1)",
    "twilight(budget=1.0, dense_layers=0)",
    "twilight(budget=1.0, candidates=1.0, dense_layers=0)",
]
SIZES = {POLICIES[-2]: [16, 128], POLICIES[-1]: [16], **{line: [16] for line in POLICIES[7:11]}}
"""Of a page, where not 1 and 16: four keys in two bits share a byte; 128 are four of ours."""
PYRAMID = "pyramid(snapkv(budget=4096), beta=2)"
"""Its last layers keep half of that, which is enough."""
CASES = [(line, size) for line in [*POLICIES, PYRAMID] for size in SIZES.get(line, [1, 16])]


@pytest.fixture(scope="module")
def conversation(prompts):
    batch = prompts(600, 270, 96, 33, 1)
    return batch, [prompt + batch[2] for prompt in batch]


@pytest.fixture(scope="module")
def expected(engine, random_llama, conversation):
    with engine(random_llama()) as stock:
        return [stock.generate(batch, 12) for batch in conversation]


@pytest.mark.parametrize("policy, page_size", CASES)
def test_full_budget_equals_stock(engine, random_llama, conversation, expected, policy, page_size):
    with engine(random_llama(), policy, page_size=page_size) as planned:
        assert [planned.generate(batch, 12) for batch in conversation] == expected
        assert planned.backend.planned_steps == 0, "nothing is left to do but the stock path"
        assert planned.backend.packed_prompts == planned.backend.selected_queries == 0


@pytest.mark.parametrize("policy, page_size", [case for case in CASES if case[0] != "dense"])
def test_so_it_does_the_long_way_round(
    engine, random_llama, conversation, expected, policy, page_size
):
    """Selected, packed and rewritten, though all is kept and all is read."""
    longest = json.dumps({"policy": policy, "shortcut": False})
    with engine(random_llama(), longest, page_size=page_size) as planned:
        assert [planned.generate(batch, 12) for batch in conversation] == expected
        assert planned.backend.planned_steps > 20
        prompts_of_a_page = sum(len(p) >= page_size for batch in conversation for p in batch)
        scored = "budget=4096)" in policy and not policy.startswith(("quest", "streaming"))
        assert planned.backend.packed_prompts == (prompts_of_a_page if scored else 0)
        layers = 0 if "dense_layers" not in policy else 1 if "dense_layers=1" in policy else 2
        assert planned.backend.selected_queries == layers * 11 * 10


@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[4]])
def test_overlap_off_and_no_prefix_cache(engine, random_llama, conversation, expected, policy):
    longest = json.dumps({"policy": policy, "shortcut": False})
    off = {"disable_overlap_schedule": True, "disable_radix_cache": True}
    with engine(random_llama(), longest, **off) as planned:
        assert [planned.generate(batch, 12) for batch in conversation] == expected
        assert planned.free == (16384, 0)


def test_smollm2(engine, smollm2, prompts):
    """A real model: nine heads over three, bfloat16, tied to nothing of ours."""
    batch = prompts(170, 40, vocab=40000)
    options = {"dtype": "bfloat16"}
    with engine(smollm2, **options) as stock:
        expected = stock.generate(batch, 6)
    for policy in ("quest(budget=4096, dense_layers=0)", "snapkv(budget=4096)"):
        with engine(smollm2, policy, **options) as planned:
            assert planned.generate(batch, 6) == expected


OFFER = {
    "policy": POLICIES[1],
    "allow": ["snapkv", "chunkkv", "lagkv", "keydiff"],
    "max_budget": 4096,
}
CHOSEN = [
    *("dense", *POLICIES[1:3], "snapkv(budget=4096)", "chunkkv(lagkv(budget=4096))"),
    "keydiff(budget=4096) + quest(budget=4096, dense_layers=0)",
]
ALONE = [
    "streaming_llm(window=4096)",
    "streaming_llm(window=4096) + quest(budget=4096, dense_layers=1)",
    "twilight(budget=1.0, dense_layers=0)",
]
"""Those that share no batch, which make a step of their own where the long way is taken."""
KINDS = [(16, True), (1, False), (16, False)]
SPARSE = KINDS[-1]
"""Whose ranks also read prompts sparsely."""


def alone_on(page_size: int, shortcut: bool) -> list[str]:
    """Policies that mix with no other, where pages of this size serve them."""
    return [line for line in ALONE if page_size in SIZES.get(line, [1, 16]) and not shortcut]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Servers whose prompts are read sparsely, by all KV heads alike and by each its own way."""
    by_kind = heads.line(tmp_path_factory.mktemp("heads"))
    lines = ["xattention(threshold=0.7, sinks=32)", "block_quest(budget=160, sinks=32)"]
    return [
        ({"policy": "dense", "allow": ["xattention", "block_quest"]}, [None, *lines]),
        ({"policy": by_kind}, [None]),
    ]


@pytest.fixture(scope="module")
def two_ranks(random_llama, conversation, sparse, tmp_path_factory):
    """What two tensor-parallel ranks answered and counted: (page size, shortcut) -> servers."""
    servers = [
        {
            "kvplug": json.dumps({**settings, "shortcut": shortcut}),
            "asks": asks,
            "options": {
                "page_size": page_size,
                "max_total_tokens": 65536,
                "nccl_port": free_port(),
            },
        }
        for page_size, shortcut in KINDS
        for settings, asks in [
            (OFFER, CHOSEN),
            *(({"policy": policy}, [None]) for policy in alone_on(page_size, shortcut)),
            *(sparse if (page_size, shortcut) == SPARSE else ()),
        ]
    ]
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {"model": str(random_llama()), "batches": conversation, "servers": servers}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("two_ranks.py"))
    ranks = []
    try:
        for rank in "01":
            with (folder / f"{rank}.log").open("w") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, script, rank, folder / "jobs.json", folder / rank],
                        stdout=log, stderr=subprocess.STDOUT,
                        env={**os.environ, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
                    )
                )  # fmt: skip
        for rank, process in enumerate(ranks):
            assert process.wait(800) == 0, (folder / f"{rank}.log").read_text()[-4000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    first, second = (json.loads((folder / rank).read_text()) for rank in "01")
    assert first == second, "the ranks chose alike"
    answers = iter(first)
    found = {kind: list(islice(answers, 1 + len(alone_on(*kind)))) for kind in KINDS}
    return {**found, "sparse": list(answers)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page_size, shortcut", KINDS)
def test_two_ranks_equal_stock(two_ranks, conversation, expected, page_size, shortcut):
    """Tensor parallel 2, chunk 256, overlap on; policies that may mix do so in one batch."""
    mixed, *alone = two_ranks[page_size, shortcut]
    for place, policy in enumerate(CHOSEN):
        answers = [batch[5 * place :][:5] for batch in mixed["answers"]]
        assert answers == expected, policy
    for policy, server in zip(alone_on(page_size, shortcut), alone, strict=True):
        assert server["answers"] == expected, policy
    for server in (mixed, *alone):
        assert server["free"] == 65536
        assert server["kv_heads"] == 1, "half of the model's"
        assert server["overlap"]

    counts = [
        [server[name] for server in (mixed, *alone)]
        for name in ("planned_steps", "packed_prompts", "selected_queries")
    ]
    if shortcut:
        assert counts == [[0]] * 3, "nothing is left to do but the stock path"
        return
    planned, packed, selected = counts
    assert min(planned) > 20
    prompts_of_a_page = sum(len(p) >= page_size for batch in conversation for p in batch)
    packers = sum(parse(policy).scored is not None for policy in CHOSEN)
    assert packed == [packers * prompts_of_a_page, *(0 for _ in alone)]
    layers = (2 + 2 + 2, 0, 1, 2)  # that select: of those that mix, then of each of ALONE
    queries = 11 * 10  # decoded by ten requests in each of them
    assert selected == [layer * queries for layer in layers[: 1 + len(alone)]]


@pytest.mark.timeout(900)
def test_two_ranks_read_prompts_as_one(engine, random_llama, two_ranks, conversation, sparse):
    """Each rank scores the pages of its own KV head, by its own row of a file of heads."""
    read = []
    for (settings, asks), ranks in zip(sparse, two_ranks["sparse"], strict=True):
        with engine(random_llama(), json.dumps({**settings, "shortcut": False})) as alone:
            for batch, found in zip(conversation, ranks["answers"], strict=True):
                rids = [alone.send(prompt, 12, ask) for ask in asks for prompt in batch]
                alone.drain()
                assert found == [alone.output(rid) for rid in rids]
                read += [found[n : n + len(batch)] for n in range(0, len(found), len(batch))]
            assert alone.backend.selected_blocks
    assert len({json.dumps(answers) for answers in read}) == len(read), "each read something else"
