"""Models of recurrent layers beside attention: a policy plans these, those stay as they are."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from itertools import count

import pytest
import torch
from definition import Reads
from test_eviction import Shadow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAGED = {"disable_radix_cache": True}
CACHED = {
    "mamba_radix_cache_strategy": "no_buffer", "page_size": 1, "disable_overlap_schedule": True,
}  # fmt: skip
"""On a CPU SGLang's tree keeps the states of requests that ended, in pages of one token."""
FORCED = {
    "granite4": [
        ("quest(budget=4096, dense_layers=0)", PAGED),
        ("snapkv(budget=4096) + twilight(budget=1.0, dense_layers=0)", PAGED),
        ("keydiff(budget=4096) + quest(budget=4096, dense_layers=0)", CACHED),
        ("streaming_llm(sinks=4, window=4096)", CACHED),
    ],
    "falcon_h1": [("keydiff(budget=4096) + quest(budget=4096, dense_layers=0)", CACHED)],
    "qwen3_next": [("keydiff(budget=4096) + quest(budget=4096, dense_layers=0)", CACHED)],
}
"""With room for all, and everything going through them."""
LAYERS = {"granite4": [1, 3], "falcon_h1": [0, 1], "qwen3_next": [1, 3]}
"""That attend."""
CLASSES = {
    "granite4": "GraniteMoeHybridForCausalLM", "falcon_h1": "FalconH1ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}  # fmt: skip


@pytest.fixture(autouse=True)
def recurrent_kernels(monkeypatch):
    import recurrent

    recurrent.install(monkeypatch)
    monkeypatch.setenv("SGLANG_MAMBA_CONV_DTYPE", "float32")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def build(name):
        folder = tmp_path_factory.mktemp("model") / name
        random_hybrid = import_module("kvplug_evals.models.random_hybrid")
        getattr(random_hybrid, f"build_random_{name}")(folder)
        return folder

    return build


@pytest.fixture(scope="module")
def granite4(build):
    return build("granite4")


class States:
    """Of a request in the recurrent layers behind five of its tokens. [layers, heads, P, N]"""

    def __init__(self, engine) -> None:
        self.engine, self.found = engine, None
        engine.steps.append(self.look)

    def look(self) -> None:
        ahead = self.engine.scheduler.enable_overlap  # a step that is not in the answer yet
        for request in self.engine.scheduler.running_batch.reqs:
            if request.rid == "request-0" and len(request.output_ids) + ahead == 6:
                pool = self.engine.scheduler.req_to_token_pool.mamba_pool
                self.found = pool.mamba_cache.temporal[:, int(request.kv.mamba_pool_idx)].clone()


def by_transformers(name, folder, prompt, tokens):
    """What its own PyTorch answers."""
    import transformers

    model = getattr(transformers, CLASSES[name]).from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    for _ in range(tokens):
        chosen = model(ids, use_cache=False).logits[:, -1].argmax(1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
    return ids[0, len(prompt) :].tolist()


def settled(engine, total=16384):
    """Whether every slot of both pools is free, or evictable."""
    pool = engine.scheduler.req_to_token_pool
    states = pool.mamba_allocator.available_size() + engine.tree.mamba_evictable_size()
    return sum(engine.free) == total and states == pool.mamba_pool.size


@pytest.mark.parametrize("name", FORCED)
def test_full_budget_equals_stock_token_for_token_and_state_for_state(
    engine, build, prompts, name
):
    model, first = build(name), prompts(700, 330, 33, 1)
    second = [prompt + first[2] for prompt in first]

    def turns(server):
        states = States(server)
        return [server.generate(batch, 8) for batch in (first, second)], states.found

    with engine(model, **PAGED) as stock:
        expected, states = turns(stock)
        assert states is not None
    assert expected[0][2][:4] == by_transformers(name, model, first[2], 4)
    for policy, options in FORCED[name]:
        forced = json.dumps({"policy": policy, "shortcut": False})
        with engine(model, forced, **options) as planned:
            answers, found = turns(planned)
            assert answers == expected, policy
            torch.testing.assert_close(found, states, rtol=0, atol=1e-4)
            assert planned.backend.layers == LAYERS[name]
            whole = sum(len(p) >= planned.scheduler.page_size for p in [*first, *second])
            packs = policy.startswith(("snapkv", "keydiff"))
            assert planned.backend.packed_prompts == (whole if packs else 0)
            assert bool(planned.backend.selected_queries) == (
                "budget=4096, " in policy or "twilight" in policy
            )
            hits = [planned.cached(rid) for rid in list(planned.requests)[4:]]
            assert hits == ([700, 330, 33, 1] if options is CACHED else [0] * 4)
            assert settled(planned)


TRACKED = {
    "mamba_radix_cache_strategy": "extra_buffer",
    "page_size": 16,
    "mamba_track_interval": 64,
}
"""As on GPUs: states of earlier tokens are kept too, one in 64."""


def test_a_tree_that_tracks_states_as_on_a_gpu(engine, granite4, prompts, monkeypatch):
    """The next turn hits a prompt as far as its last state, compressed or not."""
    from sglang.srt.arg_groups import mamba_hook

    monkeypatch.setattr(mamba_hook, "_platform_supports_mamba_cache_extra_buffer", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    first, more = prompts(330, 150, 33, seed=4), prompts(60)[0]
    small = "snapkv(budget=64, window=16) + quest(budget=48, dense_layers=0)"
    full = {"policy": FORCED["granite4"][2][0], "shortcut": False}
    answers = []
    for policy in (None, json.dumps(full), small):
        with engine(granite4, policy, **TRACKED) as planned:
            begun = planned.generate(first, 8)
            turn = [prompt + answer + more for prompt, answer in zip(first, begun, strict=True)]
            rids = [planned.send(prompt, 8) for prompt in turn]
            planned.drain()
            second = [planned.output(rid) for rid in rids]
            assert [planned.cached(rid) for rid in rids] == [320, 128, 0]
            assert settled(planned)
            answers.append((begun, second))
            if policy == small:
                assert planned.backend.packed_prompts == 2 + 3, "33 tokens stay whole"
                planned.forget()
                assert planned.generate(turn, 8) == second, "over a prefix as if fresh"
    stock, forced, compressed = answers
    assert forced == stock != compressed


def test_small_budgets_are_their_definitions(engine, granite4, prompts, monkeypatch):
    reads = Reads(monkeypatch)
    with engine(granite4, "quest(budget=96, dense_layers=0)", **PAGED) as planned:
        planned.generate(prompts(500, 250, 33), 4)
    assert reads.checked == 2 * 2 * 3, "33 tokens are read whole"
    assert reads.spared > 0
    shadow = Shadow(monkeypatch)
    with engine(granite4, "snapkv(budget=96, window=16)", **CACHED) as planned:
        for prompt in prompts(450, 157, seed=5):
            planned.forget()
            shadow.made.clear()
            planned.generate([prompt], 3)
    assert shadow.packed == 2 * 2


def later(passes, act):
    if next(passes) == 12:
        act()


OFFER = {
    "policy": "snapkv(budget=64, window=16)",
    "allow": ["quest", "keydiff", "knorm"],
    "max_budget": 96,
}
CHOICES = [
    None,
    "dense",
    "quest(budget=64, dense_layers=0)",
    "keydiff(budget=64) + quest(budget=48, dense_layers=0)",
    "knorm(budget=48, chunk=96)",
    {"budget": 96},
]


def test_a_small_pool_of_requests_that_end_come_back_and_share_prompts(
    engine, granite4, prompts, monkeypatch
):
    """Retracted, aborted and in a batch they answer as alone, and no state or slot is lost."""
    import sglang.srt.managers.scheduler as scheduling

    begin = prompts(130, seed=7)[0]
    ends = prompts(*range(11, 200, 24), seed=8)
    asked = [
        ((begin if n % 2 else []) + end, CHOICES[n % len(CHOICES)]) for n, end in enumerate(ends)
    ]
    small = {"max_total_tokens": 1024, **CACHED}
    with engine(granite4, json.dumps(OFFER), **small) as server:
        alone = []
        for prompt, policy in asked:
            server.forget()
            alone.append(server.generate([prompt], 24, policy)[0])
        server.forget()
        monkeypatch.setattr(scheduling, "TEST_RETRACT", True)
        monkeypatch.setattr(scheduling, "TEST_RETRACT_INTERVAL", 23)
        for _ in range(2):  # the second time over what the first left in the tree
            rids = [server.send(prompt, 24, policy) for prompt, policy in asked]
            doomed = server.send(begin, 24)
            server.steps[:] = [partial(later, count(), partial(server.abort, doomed))]
            server.drain()
            wrong = [n for n, rid in enumerate(rids) if server.output(rid) != alone[n]]
            assert not wrong
            assert settled(server, 1024)
        requests = server.requests.values()
        assert sum(request.retraction_count for request in requests) >= 3
        assert sum(request.cached_tokens for request in requests) > 0
        from kvplug_sglang.settings import Engine

        assert not Engine.serving().router.tenants
