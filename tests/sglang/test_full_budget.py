"""With the whole cache as budget every policy is the stock engine, token for token."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

POLICIES = [
    "dense",
    "quest(budget=4096, dense_layers=0)",
    "quest(budget=4096, top_p=1.0, dense_layers=0)",
    "streaming_llm(window=4096)",
    "snapkv(budget=4096)",
    "knorm(budget=4096)",
    "random(budget=4096)",
    "keydiff(budget=4096) + quest(budget=4096, dense_layers=0)",
    "streaming_llm(window=4096) + quest(budget=4096, dense_layers=1)",
]


@pytest.fixture(scope="module")
def conversation(prompts):
    batch = prompts(900, 530, 96, 33, 1)
    return batch, [prompt + batch[2] for prompt in batch]


@pytest.fixture(scope="module")
def expected(engine, random_llama, conversation):
    with engine(random_llama()) as stock:
        return [stock.generate(batch, 12) for batch in conversation]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_full_budget_equals_stock(engine, random_llama, conversation, expected, policy, page_size):
    with engine(random_llama(), policy, page_size=page_size) as planned:
        assert [planned.generate(batch, 12) for batch in conversation] == expected
        assert planned.backend.planned_steps == 0, "nothing is left to do but the stock path"
        assert planned.backend.packed_prompts == planned.backend.selected_queries == 0


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", POLICIES[1:])
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
        layers = 0 if "quest" not in policy else 1 if "dense_layers=1" in policy else 2
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
    batch = prompts(700, 300, 40, vocab=40000)
    options = {"dtype": "bfloat16"}
    with engine(smollm2, **options) as stock:
        expected = stock.generate(batch, 8)
    for policy in ("quest(budget=4096, dense_layers=0)", "snapkv(budget=4096)"):
        with engine(smollm2, policy, **options) as planned:
            assert planned.generate(batch, 8) == expected
