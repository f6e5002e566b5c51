"""Layers that read another layer's cache choose by their own queries, and keep what it keeps."""

from __future__ import annotations

import pytest

from tests.vllm.test_requests import generate
from tests.vllm.test_selection import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

FORCED = [
    "quest(budget=4096, dense_layers=0)",
    "knorm(budget=4096) + twilight(budget=1.0, dense_layers=0)",
    "streaming_llm(sinks=4, window=4096)",
]
OFFER = {"policy": "dense", "allow": ["quest", "keydiff", "random"], "max_budget": 128}
SMALL = [
    "quest(budget=96, dense_layers=0)",
    "keydiff(budget=128)",
    "random(budget=96) + quest(budget=64, dense_layers=0)",
]
GLOBAL = [1, 3, 5]
"""Layers; the last reads the cache of the one before it."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("gemma4", marks=pytest.mark.both),
        pytest.param("gemma3n", marks=pytest.mark.cpu),
    ],
)
def gemma(request, tmp_path_factory):
    from kvplug_evals.models import random_shared

    folder = tmp_path_factory.mktemp("model") / request.param
    getattr(random_shared, f"build_random_{request.param}")(folder)
    return folder


def test_policies_answer_as_stock_at_full_budget_and_in_a_batch_as_alone(engine, gemma, prompts):
    batch = prompts(600, 330, 33, 1)
    with engine(gemma) as stock:
        expected = stock.generate(batch, 8)
    for line in FORCED:
        with engine(gemma, {"policy": line, "shortcut": False}) as planned:
            assert planned.generate(batch, 8) == expected
            packed = [impl.packed_prompts for impl in planned.impls]
            wanted = 3 * (line.startswith("knorm"))  # all but one token's prompt, by their owners
            assert packed == [0, wanted, 0, wanted, 0, 0]
    with engine(gemma, OFFER) as planned:
        asked = [(prompt, line) for line in (None, *SMALL) for prompt in batch]
        together = generate(planned, asked, 8)
        assert together[: len(batch)] == expected
        planned.forget()
        assert together == [generate(planned, [one], 8)[0] for one in asked]
        long = [n for n, (prompt, _) in enumerate(asked) if len(prompt) > 300][2:]
        assert any(together[n] != expected[n % len(batch)] for n in long)


@pytest.mark.parametrize("policy", ["quest(budget=96, ", "twilight(budget=0.2, "])
def test_selection_is_the_definition_over_the_owners_keys(
    engine, gemma, prompts, monkeypatch, policy
):
    shadow = Shadow(monkeypatch)
    with engine(gemma, {"policy": f"{policy}dense_layers=0)"}) as planned:
        planned.generate(prompts(500, 250, 33), 6)
        counted = planned.selected
    assert [n for n, queries in enumerate(counted) if queries] == GLOBAL
    assert len({counted[n] for n in GLOBAL}) == 1
    assert shadow.checked
    assert shadow.spared
