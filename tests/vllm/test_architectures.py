"""Models whose layers are not all plain attention with a cache of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.test_requests import generate
from tests.vllm.test_selection import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

FORCED = [
    "quest(budget=4096, dense_layers=0)",
    "keydiff(budget=4096) + twilight(budget=1.0, dense_layers=0)",
    "streaming_llm(sinks=4, window=4096)",
]
"""With room for all, and everything going through them."""
SMALL = [
    "quest(budget=96, dense_layers=0)",
    "keydiff(budget=256)",
    "random(budget=256) + quest(budget=64, dense_layers=0)",
]


@dataclass(frozen=True)
class Architecture:
    name: str
    planned: Sequence[int]
    """Layers that the policy plans."""
    owners: Sequence[int]
    """Those of them with a cache of their own."""
    module: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, folder: Path) -> Path:
        getattr(import_module(f"kvplug_evals.models.{self.module}"), f"build_random_{self.name}")(
            folder
        )
        return folder


OWN_BLOCKS = {"block_size": None}
"""The model's, of hundreds of tokens."""
ARCHITECTURES = [
    pytest.param(architecture, id=architecture.name, marks=mark)
    for architecture, mark in (
        (
            Architecture("granite4", [1, 3], [1, 3], "random_hybrid", OWN_BLOCKS),
            pytest.mark.both,
        ),
        (
            Architecture("falcon_h1", [0, 1], [0, 1], "random_hybrid", OWN_BLOCKS),
            pytest.mark.cpu,
        ),
        (Architecture("gemma4", [1, 3, 5], [1, 3], "random_shared"), pytest.mark.both),
        (Architecture("gemma3n", [1, 3, 5], [1, 3], "random_shared"), pytest.mark.cpu),
        (Architecture("gpt_oss", [1, 3], [1, 3], "random_gpt_oss"), pytest.mark.both),
        (Architecture("llama4", [3], [3], "random_chunked"), pytest.mark.both),
        (Architecture("gemma2", [1, 3], [1, 3], "random_llama"), pytest.mark.cpu),
    )
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture, tmp_path_factory):
    return architecture.build(tmp_path_factory.mktemp("model") / architecture.name)


def impls(engine):
    """Of the layers that attend, by their number."""
    from kvplug_vllm.compat import layer_index

    found = {
        layer_index(name): layer.impl
        for name, layer in engine.layers.items()
        if hasattr(getattr(layer, "impl", None), "planned")
    }
    return dict(sorted(found.items()))


def test_policies_answer_as_stock_at_full_budget_and_in_a_batch_as_alone(
    engine, architecture, model, prompts
):
    batch, options = prompts(700, 330, 33, 1), architecture.options
    with engine(model, **options) as stock:
        expected = stock.generate(batch, 8)
    for line in FORCED:
        with engine(model, {"policy": line, "shortcut": False}, **options) as planned:
            assert planned.generate(batch, 8) == expected
            found = impls(planned)
            assert [n for n in found if found[n].planned] == architecture.planned
            packed = [n for n in found if found[n].packed_prompts]
            assert packed == (architecture.owners if "keydiff" in line else [])
    offer = {"policy": "dense", "allow": ["quest", "keydiff", "random"], "max_budget": 256}
    with engine(model, offer, **options) as planned:
        asked = [(prompt, line) for line in (None, *SMALL) for prompt in batch]
        answers = iter(generate(planned, asked, 8))
        assert list(islice(answers, 4)) == expected
        planned.forget()
        for line in SMALL:
            *long, short, shortest = islice(answers, 4)
            assert [short, shortest] == expected[2:], "nothing of them is left out"
            assert long == [generate(planned, [(prompt, line)], 8)[0] for prompt in batch[:2]]
            assert long != expected[:2], "budgets small enough to matter"


@pytest.mark.parametrize("policy", ["quest(budget=96, ", "twilight(budget=0.2, "])
def test_selection_is_the_definition(engine, architecture, model, prompts, monkeypatch, policy):
    """By each layer's own queries, over the keys of whoever owns its cache."""
    shadow = Shadow(monkeypatch)
    line = {"policy": f"{policy}dense_layers=0)"}
    with engine(model, line, **architecture.options) as planned:
        planned.generate(prompts(500, 250, 33), 6)
        counted = [
            builder.selected_queries for builder in planned.builders
            if hasattr(builder, "selected_queries")
        ]  # fmt: skip
    queries = {n: count for each in counted for n, count in each.items()}
    assert sorted(queries) == architecture.planned
    assert len(set(queries.values())) == 1
    assert shadow.checked
    assert shadow.spared
