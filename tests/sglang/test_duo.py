"""Heads of two kinds keep different numbers of pages in the same private slots."""

from __future__ import annotations

import json

import pytest

from tests import heads
from tests.plain_llama import Plain, TwoKinds

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KEYS, QUERIES = "keydiff(budget=128)", "snapkv(budget=160, window=16)"
SLOTS = 16384


@pytest.fixture(scope="module")
def model(random_llama):
    return random_llama(layers=4, heads=8, kv_heads=4, head_dim=32)


@pytest.fixture(scope="module")
def duo(model, tmp_path_factory):
    return heads.duo(tmp_path_factory.mktemp("heads"), model)


def settled(planned, slots: int = SLOTS) -> bool:
    """Nothing is held any more, in the tree or by a request."""
    return sum(planned.free) == slots and not planned.backend.engine.router.tenants


def poison(planned) -> None:
    """Whatever is free is NaN, at every pass of the event loop."""
    pool, size = planned.backend.token_to_kv_pool, planned.backend.engine.page_size

    def fill():
        pages = planned.allocator.get_all_free_pages()
        for layer in planned.backend.layers:
            for cache in pool.get_kv_buffer(layer):
                cache[: len(cache) // size * size].unflatten(0, (-1, size))[pages] = float("nan")

    planned.steps.append(fill)


@pytest.mark.parametrize("base, page_size, overlap", [(KEYS, 16, True), (QUERIES, 1, False)])
def test_answers_are_those_of_a_plain_llama_whose_heads_keep_different_tokens(
    engine, model, duo, prompts, base, page_size, overlap
):
    """Batch, alone and plain; freed slots are poisoned, prompts come in chunks of 256."""
    batch = prompts(600, 333, 230, 97)
    policy, options = duo(base), {"disable_overlap_schedule": not overlap}
    options |= {"disable_radix_cache": True, "max_total_tokens": 4096, "page_size": page_size}
    with engine(model, policy, **options) as planned:
        poison(planned)
        answers = planned.generate(batch, 40)
        assert [planned.generate([each], 40)[0] for each in batch[1:3]] == answers[1:3]
        assert settled(planned, 4096)
        assert len(planned.backend.steps[0].kinds) == 2
    plain = TwoKinds(model, policy, page_size)
    plain.pages.clear()
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [40] * 4
    kept, least = plain.scored.pages(page_size), 48 // page_size
    different = {
        (0, 0, least), (0, 1, 4 * kept - 3 * least), (1, 1, least), (1, 0, 2 * kept - least),
    }  # fmt: skip
    assert different < plain.pages, "heads of a layer keep different numbers of pages"
    assert (3, 0, kept) in plain.pages, "a layer of one kind keeps what the base does"
    assert Plain(model, base, page_size).agrees(batch[1], answers[1]) < 40


def test_full_budget_equals_stock(engine, model, duo, prompts):
    batch = prompts(600, 270, 96, 33, 1)
    turns = [batch, [prompt + batch[2] for prompt in batch]]
    with engine(model) as stock:
        expected = [stock.generate(turn, 12) for turn in turns]
    given = json.dumps({"policy": duo("snapkv(budget=4096)"), "shortcut": False})
    with engine(model, given) as planned:
        assert planned.generate(batch, 12) == expected[0]
        assert planned.backend.packed_prompts == 4, "all but one token's"
        assert planned.generate(turns[1], 12) == expected[1]


def test_requests_retracted_aborted_and_found_again(engine, model, duo, prompts, monkeypatch):
    """Beside a prefix cache, in steps that prefill some and decode others."""
    batch, (long,) = prompts(40, 333, 97, 230, 150, seed=4), prompts(700, seed=5)
    with engine(model, duo(QUERIES), enable_mixed_chunk=True) as planned:
        import sglang.srt.managers.scheduler as scheduling

        alone = []
        for prompt in batch:
            planned.forget()
            alone += planned.generate([prompt], 60)
        planned.forget()
        assert planned.generate(batch, 60) == alone
        again = planned.send(batch[1], 60)
        planned.drain()
        assert planned.output(again) == alone[1]
        assert planned.cached(again) == (333 - 16) // 16 * 16, "all but the window"

        doomed, seen = planned.send(long, 60), []

        def abort_once_packed():
            tenant = planned.backend.engine.router.tenants.get(doomed)
            if tenant is not None and tenant.swapped and not seen:
                seen.append(len(planned.output(doomed)))
                planned.abort(doomed)

        planned.steps.append(abort_once_packed)
        planned.drain()
        assert seen
        assert len(planned.output(doomed)) < 60
        planned.forget()
        monkeypatch.setattr(scheduling, "TEST_RETRACT", True)
        monkeypatch.setattr(scheduling, "TEST_RETRACT_INTERVAL", 23)
        rids = [planned.send(prompt, 60) for prompt in batch]
        planned.drain()
        assert sum(planned.requests[rid].retraction_count for rid in rids) >= 3
        assert [planned.output(rid) for rid in rids] == alone
        assert settled(planned)


def test_a_request_holds_what_its_base_would_and_less_than_a_head_keeps(
    engine, model, duo, prompts
):
    """Of 700 tokens the only retrieval head of a layer keeps 23 pages; slots of 8 stay."""
    with engine(model, duo(KEYS), disable_radix_cache=True, max_total_tokens=4096) as planned:
        rid, held = planned.send(prompts(700)[0], 40), []
        planned.steps.append(lambda: held.append(4096 - sum(planned.free)))
        planned.drain()
        assert len(planned.output(rid)) == 40
        assert max(held) >= 700
        assert 128 + 700 % 16 < held[-2] <= 128 + 700 % 16 + 40 + 2 * 16
        assert settled(planned, 4096)
        assert 4 * 8 - 3 * 3 == 23, "its head pages"
