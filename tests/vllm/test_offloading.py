"""Pages that left the pool for host memory, by vLLM's own connector, and came back."""

from __future__ import annotations

import pytest
import torch
import twin

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


@pytest.mark.parametrize(
    "policy", ["quest(budget=96, dense_layers=0)", "twilight(budget=48, dense_layers=0)"]
)
def test_a_prefix_from_host_memory_is_chosen_from_as_it_was(
    engine, random_llama, prompts, chosen, policy
):
    model, asked = random_llama(layers=2, heads=4, kv_heads=2), prompts(*LENGTHS)
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
        assert cached == [672, 320, 64], "of the last all is back, and its end is computed again"
        assert HostMemory.worker is not None
        assert HostMemory.worker.moved["loaded"] == sum(cached) // 32
        assert again == first
        assert came_back == choices
        assert bool(choices) != REPLAYS
