"""Models of windowed layers between global ones: a policy plans these, those stay as they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kvplug_evals.models.random_llama import build_random_gemma3

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

WINDOW = 128
GLOBAL = [1, 3]
FORCED = {
    "quest(budget=4096, dense_layers=0)": 0,
    "keydiff(budget=4096) + twilight(budget=1.0, dense_layers=0)": 3,
    "pyramid(snapkv(budget=4096), beta=2)": 3,
    "streaming_llm(sinks=4, window=4096)": 0,
}
"""With room for all, and everything going through them; prompts of a page and more are packed."""
SMALL = [
    "quest(budget=96, dense_layers=0)",
    "keydiff(budget=256)",
    "random(budget=128) + quest(budget=64, dense_layers=0)",
]


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "gemma3"
    build_random_gemma3(folder, window=WINDOW)
    return folder


@pytest.fixture(scope="module")
def batch(prompts):
    return prompts(700, 330, 33, 1)


@pytest.fixture(scope="module")
def expected(engine, gemma3, batch):
    with engine(gemma3) as stock:
        return stock.generate(batch, 8)


@pytest.mark.parametrize("policy", FORCED)
def test_the_long_way_round_with_full_budget_equals_stock(engine, gemma3, batch, expected, policy):
    with engine(gemma3, json.dumps({"policy": policy, "shortcut": False})) as planned:
        assert planned.generate(batch, 8) == expected
        backend = planned.backend
        assert backend.layers == GLOBAL
        assert backend.windows == {0: WINDOW, 2: WINDOW}
        assert backend.packed_prompts == FORCED[policy]
        assert backend.planned_steps > 5
        if policy.startswith("quest"):
            check_digests(planned)


def check_digests(planned) -> None:
    """Of the global layers alone: they say what their pages hold, and are paid for."""
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    backend = planned.backend
    assert len(backend.digests.rows) == len(GLOBAL)
    for layer in GLOBAL:
        digest = backend.digests.of_layer(layer)
        keys = backend.token_to_kv_pool.get_key_buffer(layer).unflatten(0, (-1, 16))[1:]
        full = keys.ne(0).any(3).all(2).all(1)  # [P]
        assert full.sum() >= (700 + 330) // 16
        assert torch.equal(digest[1:][full][:, :, 0], keys[full].amin(1))
        assert torch.equal(digest[1:][full][:, :, 1], keys[full].amax(1))
    configurator = planned.scheduler.tp_worker.model_runner.kv_cache_configurator
    token = DefaultPoolConfigurator(configurator)._cell_size
    pool = backend.token_to_kv_pool
    assert 16 * token == backend.engine.page_bytes
    assert 16 * token == sum(pool.get_kv_size_bytes()) * 16 // (pool.size + 16) + (
        backend.digests.rows[:, 0].nbytes
    )


class Rows:
    """Keys by layer and position as the model made them, and what the rows of requests hold."""

    def __init__(self, planned, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvplug_sglang.attention import PlannedAttention

        self.made: dict[int, list[torch.Tensor]] = {}
        self.checked = 0
        self.planned = planned
        forward = PlannedAttention._forward

        def shadow(backend, stock, q, k, v, layer, *more):
            keys = k.view(len(k), layer.tp_k_head_num, -1).clone()
            self.made.setdefault(layer.layer_id, []).append(keys)
            return forward(backend, stock, q, k, v, layer, *more)

        monkeypatch.setattr(PlannedAttention, "_forward", shadow)
        planned.steps.append(self.check)

    def check(self) -> None:
        """Of one request alone: what a windowed layer still sees stands where it looks for it."""
        for request in self.planned.scheduler.running_batch.reqs:
            if request.finished():
                continue
            row = self.planned.backend.req_to_token_pool.req_to_token[request.kv.req_pool_idx]
            for layer in self.planned.backend.windows:
                made = torch.cat(self.made[layer])
                begin = max(0, len(made) - WINDOW + 1)
                held = self.planned.backend.token_to_kv_pool.get_key_buffer(layer)
                assert torch.equal(held[row[begin : len(made)].long()], made[begin:])
                self.checked += bool((row[:begin] == 0).any())


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", ["keydiff(budget=128)", "streaming_llm(sinks=4, window=128)"])
def test_windowed_layers_keep_their_window(
    engine, gemma3, prompts, monkeypatch, policy, page_size
):
    overlap = {"disable_overlap_schedule": True}  # all that was made has been written
    with engine(gemma3, policy, page_size=page_size, **overlap) as planned:
        rows = Rows(planned, monkeypatch)
        for prompt in prompts(700, 337, seed=3):
            planned.forget()
            rows.made.clear()
            planned.generate([prompt], 40)
        assert rows.checked > 2 * 2 * 30, "steps whose row had lost its beginning"
        assert sum(planned.free) == 16384


def test_policies_of_their_own_in_a_batch_answer_as_alone(engine, gemma3, batch, expected):
    offer = {"policy": "dense", "allow": ["quest", "keydiff", "random"], "max_budget": 256}
    with engine(gemma3, json.dumps(offer)) as planned:
        asked = [(prompt, line) for line in (None, *SMALL) for prompt in batch]
        rids = [planned.send(prompt, 8, line) for prompt, line in asked]
        planned.drain()
        together = [planned.output(rid) for rid in rids]
        assert together[: len(batch)] == expected
        assert together[len(batch) :] != expected * len(SMALL), "budgets small enough to matter"
        planned.forget()
        assert together == [planned.generate([prompt], 8, line)[0] for prompt, line in asked]

        narrow = planned.send(batch[0], 8, "keydiff(budget=64)")
        served = planned.send(batch[1], 8)
        planned.drain()
        assert planned.output(served) == expected[1]
        refused = planned.requests[narrow].finished_reason
        assert "write budget=127 or more" in refused.message


def test_a_model_of_windowed_layers_alone_has_nothing_to_plan():
    from kvplug import read_offer
    from kvplug_sglang.settings import Engine

    with pytest.raises(ValueError, match="nothing to plan; use the policy 'dense'"):
        Engine(read_offer({"policy": "quest"}, environ={}), 16, None).see(WINDOW, 8192, [])
    Engine(read_offer({"policy": "dense"}, environ={}), 16, None).see(WINDOW, 8192, [])


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize(
    "line",
    ["streaming_llm(sinks=0, window={})", "keydiff(budget={}, sinks=0)"],
)
def test_what_is_too_narrow_is_what_takes_from_a_window(line, size):
    """Against the definition, query by query."""
    from kvplug import Planner, read_settings
    from kvplug_sglang import windows

    longest, window = 120, 24
    for kept in range(8, 40):
        planner = Planner(read_settings({"policy": line.format(kept)}, environ={}), size)
        taken = False
        for position in range(1, longest):
            seen = set(range(max(0, position - window + 1), position))
            for first, last in planner.evictable(position) if planner.eviction else ():
                taken |= bool(seen & set(range(first * size, last * size)))
            for prompt in range(1, position + 1) if planner.scored else ():
                pages = int(planner.schedule.private_pages(np.array([prompt]))[0])
                end = prompt // size * size
                taken |= pages > 0 and bool(seen & set(range(end - pages * size)))
        try:
            windows.check(planner, window, longest)
            assert not taken, kept
        except ValueError:
            assert taken, kept
