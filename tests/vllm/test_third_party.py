"""The recipe of CONTRIBUTING.md, tried: a policy in one file of another package, in the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "random_pages"


@pytest.fixture
def random_pages(tmp_path, monkeypatch):
    from kvplug import registry

    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", tmp_path, EXAMPLE],
        check=True,
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    registry.policy_class.cache_clear()
    yield "random_pages"
    registry.policy_class.cache_clear()


def test_a_policy_of_another_package_serves(engine, random_llama, prompts, random_pages):
    model, batch = random_llama(), prompts(600, 430, 33, 1)
    with engine(model) as stock:
        expected = stock.generate(batch, 12)
    with engine(model, {"policy": f"{random_pages}(budget=4096)"}) as planned:
        planned.without_shortcut()
        assert planned.generate(batch, 12) == expected
        assert planned.selected == [44, 44], "all decode queries of both layers"
    small = f"streaming_llm(window=400) + {random_pages}(budget=128, seed=7)"
    with engine(model, {"policy": small}) as planned:
        together = planned.generate(batch, 12)
        assert together != expected
        assert together[2:] == expected[2:], "what the budget covers is dense"
        planned.forget()
        assert [planned.generate([prompt], 12)[0] for prompt in batch] == together
