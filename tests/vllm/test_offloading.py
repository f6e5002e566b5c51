"""Pages that left the pool for host memory, by vLLM's own connector, and came back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import twin

from kvplug_evals.models.random_llama import build_random_gemma3
from kvplug_vllm import attention
from tests.stand_ins.host_memory import HostMemory

pytestmark = [pytest.mark.engine, pytest.mark.both, pytest.mark.timeout(600)]

REPLAYS = twin.MODE.startswith("graphs")
LENGTHS = (700, 333, 64)
CONNECTOR = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "HostMemory",
        "spec_module_path": "tests.stand_ins.host_memory",
        "cpu_bytes_to_use": 64 << 20,
    },
}


@pytest.fixture
def chosen(monkeypatch):
    """The units that each choice took, of each request and KV head, in the order of choices;
    none where a graph replays them."""
    taken = []

    def record(*args, **kwargs):
        units, counts = choose(*args, **kwargs)
        if not REPLAYS:
            kept = torch.arange(units.shape[-1]) < counts[..., None]
            taken.append(torch.where(kept, units, -1).sort(dim=-1).values.tolist())
        return units, counts

    choose = attention.choose_units
    monkeypatch.setattr(attention, "choose_units", record)
    return taken


@pytest.fixture
def build(random_llama, tmp_path):
    def build(name: str) -> Path:
        if name == "llama":
            return random_llama()
        build_random_gemma3(tmp_path / name)
        return tmp_path / name

    return build


@pytest.mark.parametrize(
    "name, policy",
    [
        ("llama", "quest(budget=96, dense_layers=0)"),
        ("llama", "twilight(budget=48, dense_layers=0)"),
        ("gemma3", "quest(budget=96, dense_layers=0)"),  # windowed layers, pages without digests
    ],
)
def test_a_prefix_from_host_memory_is_chosen_from_as_it_was(
    engine, build, prompts, chosen, name, policy
):
    model, asked = build(name), prompts(*LENGTHS)
    with engine(model, {"policy": policy}, kv_transfer_config=CONNECTOR) as ours:
        ours.poison(freed=False)

        def round_() -> tuple[list[list[int]], list[int], list[object]]:
            chosen.clear()
            found = [ours.run([prompt])[0] for prompt in asked]
            cached = [each.num_cached_tokens for each in found]
            return [list(each.outputs[0].token_ids) for each in found], cached, chosen.copy()

        first, cached, choices = round_()
        assert cached == [0, 0, 0]
        ours.forget()
        again, cached, came_back = round_()
        # Of the last prompt of a Llama all is back, and its last token is computed again.
        assert cached == [672, 320, 64 if name == "llama" else 32]
        assert HostMemory.worker is not None
        assert HostMemory.worker.moved["loaded"] >= sum(cached) // 32
        assert again == first
        assert came_back == choices
        assert bool(choices) != REPLAYS
