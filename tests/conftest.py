"""Models and prompts for tests in either engine. Importing this imports neither."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nursery import SGLANG, VLLM, open_nursery
from tests.pace import Pace

MODELS = Path(__file__).parents[1] / ".models"
DASHBOARD = Path(__file__).parents[1] / "dashboards/kvplug.json"
LAYERS = 6
"""Of SmolLM2 in tests."""

LONGEST = (
    "test_eval", "test_models", "test_metrics", "test_replay", "test_serving", "test_server",
    "test_architectures", "test_hybrids",
    "test_admission", "test_demo", "test_eviction", "test_both_engines", "test_full_budget",
    "test_recall", "test_compile", "test_cpu", "test_lm", "test_bench_serve", "test_twin",
    "test_chunks", "test_prefill", "test_coded", "test_blended", "test_host", "test_new_user",
    "test_placed", "test_duo",
)  # fmt: skip
"""Files that take minutes, which begin first, so that no worker is alone with one at the end."""


with contextlib.suppress(ImportError):  # a machine with a GPU need not have it
    from hypothesis import HealthCheck, settings

    # A machine that others use is no fault of ours.
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Pace())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What an engine warns about is its own business; what we warn about stays an error."""
    for item in items:
        if item.get_closest_marker("engine"):
            if item.path.parent.name == "evals":
                item.add_marker(pytest.mark.cpu)
            item.add_marker(pytest.mark.filterwarnings("default", "error:::kvplug"))
    place = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """What tests of an engine start has it imported already, if they are not marked `started`."""
    if not item.get_closest_marker("engine") or item.get_closest_marker("started"):
        return (yield)
    with open_nursery(SGLANG if item.path.parent.name == "sglang" else VLLM):
        return (yield)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first six layers: a real model's heads, keys and words in a fifth of its time."""
    from safetensors.torch import load_file, save_file

    whole = MODELS / "smollm2"
    assert whole.exists(), "SmolLM2 is not built; run `make models`"
    folder = tmp_path_factory.mktemp("model") / "smollm2"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    of_layer = re.compile(r"model\.layers\.(\d+)\.")
    weights = {
        name: weight
        for name, weight in load_file(whole / "model.safetensors").items()
        if not (layer := of_layer.match(name)) or int(layer[1]) < LAYERS
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def recall() -> Path:
    folder = MODELS / "recall"
    assert folder.exists(), "the recall model is not built; run `make models`"
    return folder


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny random Llama of the given shape, built once a session."""
    from kvplug_evals.models.random_llama import build_random_llama

    built: dict[tuple[Any, ...], Path] = {}

    def build(**shape: Any) -> Path:
        key = tuple(sorted(shape.items()))
        if key not in built:
            built[key] = tmp_path_factory.mktemp("model") / "llama"
            build_random_llama(built[key], **shape)
        return built[key]

    return build


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """Random prompts of the given lengths."""

    def make(*lengths: int, vocab: int = 512, seed: int = 0) -> list[list[int]]:
        source = random.Random(seed)
        return [[source.randrange(vocab) for _ in range(length)] for length in lengths]

    return make


@pytest.fixture(scope="session")
def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


@pytest.fixture(scope="session")
def drawn(dashboard) -> set[str]:
    """Names of the metrics in the dashboard's expressions and in its variables' queries."""
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    expressions += [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    assert all(expression.count("(") == expression.count(")") for expression in expressions)
    metric = re.compile(r"\b(?:kvplug_|vllm:|sglang:)\w+")
    found = [metric.findall(expression) for expression in expressions]
    assert all(found), "an expression that asks for no metric"
    return {name for names in found for name in names}
