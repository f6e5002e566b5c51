"""Heads of two kinds keep different numbers of pages in the same private blocks."""

from __future__ import annotations

import pytest

from tests import heads
from tests.plain_llama import Plain, TwoKinds
from tests.vllm.test_eviction import add, held
from tests.vllm.test_lifecycle import ROOMY, leave, preemptions, solo, with_room

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32
KEYS, QUERIES = "keydiff(budget=128)", "snapkv(budget=160, window=16)"


@pytest.fixture(scope="module")
def model(random_llama):
    return random_llama(layers=4, heads=8, kv_heads=4, head_dim=32)


@pytest.fixture(scope="module")
def duo(model, tmp_path_factory):
    return heads.duo(tmp_path_factory.mktemp("heads"), model)


OPTIONS = {"max_model_len": 1024, "dtype": "float32"}


@pytest.mark.both
@pytest.mark.parametrize("base", [KEYS, QUERIES])
def test_answers_are_those_of_a_plain_llama_whose_heads_keep_different_tokens(
    engine, model, duo, prompts, base
):
    """Batch, alone and plain; freed blocks are poisoned, prompts come in chunks of 256."""
    batch = prompts(600, 333, 230, 97)
    policy = duo(base)
    with engine(model, {"policy": policy}, enable_prefix_caching=False, **OPTIONS) as planned:
        planned.poison(freed=True)
        free = planned.free_blocks
        answers = planned.generate(batch, 40)
        assert solo(planned, batch[1:3], 40) == answers[1:3]
        assert planned.free_blocks == free
        assert len(planned.builders[0].kinds) == 2
    plain = TwoKinds(model, policy, S)
    plain.pages.clear()
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [40] * 4
    kept = plain.scored.pages(S)
    different = {(0, 0, 2), (0, 1, 4 * kept - 6), (1, 1, 2), (1, 0, 2 * kept - 2)}
    assert different < plain.pages, "heads of a layer keep different numbers of pages"
    assert (3, 0, kept) in plain.pages, "a layer of one kind keeps what the base does"
    even = Plain(model, base, S)
    assert even.agrees(batch[1], answers[1]) < 40


@pytest.mark.both
def test_full_budget_equals_stock(engine, model, duo, prompts):
    batch = prompts(600, 270, 96, 33, 1)
    turns = [batch, [prompt + batch[2] for prompt in batch]]
    options = {**OPTIONS, "max_model_len": 2048}
    with engine(model, **options) as stock:
        expected = [stock.generate(turn, 12) for turn in turns]
    given = {"policy": duo("snapkv(budget=4096)"), "shortcut": False}
    with engine(model, given, **options) as planned:
        assert planned.generate(batch, 12) == expected[0]
        assert {impl.packed_prompts for impl in planned.impls} == {4}, "all but one token's prompt"
        assert planned.generate(turns[1], 12) == expected[1]


@pytest.mark.parametrize("base, caching", [(KEYS, True), (QUERIES, False)])
def test_preempted_requests_answer_as_alone(engine, model, duo, prompts, base, caching):
    batch = prompts(40, 60, 200, 256, 190)
    with engine(
        model, {"policy": duo(base)}, enable_prefix_caching=caching,
        num_gpu_blocks_override=ROOMY, max_num_batched_tokens=128,
        **{**OPTIONS, "max_model_len": 512},
    ) as planned:  # fmt: skip
        planned.poison(freed=not caching)
        free = planned.free_blocks
        expected = with_room(planned, batch, 160)
        seen = preemptions(planned)
        for room in (22, 26):
            hostages = leave(planned, room)
            assert planned.generate(batch, 160) == expected
            planned.pool.free_blocks(hostages)
        assert len(seen) >= 3, "the pool was meant to be too small"
        assert planned.free_blocks == free
        if caching:
            for tokens in (1, 160):
                (again,) = planned.run(batch[3:4], tokens)
                assert list(again.outputs[0].token_ids) == expected[3][:tokens]
            assert again.num_cached_tokens == (256 - 1) // S * S


def test_aborted_forked_and_identical_requests(engine, model, duo, prompts):
    long, other = prompts(333, 300)
    with engine(model, {"policy": duo(QUERIES)}, **OPTIONS) as planned:
        planned.poison(freed=False)
        free = planned.free_blocks
        expected = solo(planned, [long, other], 20)
        core = planned.llm.llm_engine
        for steps in (1, 2, 3, 5):
            add(planned, "doomed", long, 20)
            for _ in range(steps):
                core.step()
            core.abort_request(["doomed"])
            assert planned.generate([other, long, other], 20) == [
                expected[1], expected[0], expected[1],
            ]  # fmt: skip
        outputs = planned.run([long], 20, n=3, temperature=1, top_k=1)[0].outputs
        assert [list(output.token_ids) for output in outputs] == [expected[0]] * 3
        planned.forget()
        assert planned.free_blocks == free


def test_blocks_held_are_what_the_host_counts_and_less_than_a_head_keeps(
    engine, model, duo, prompts
):
    """Of 700 tokens the only retrieval head of a layer keeps 10 pages; 4 blocks stay."""
    with engine(model, {"policy": duo(KEYS)}, **OPTIONS) as planned:
        add(planned, "r", prompts(700)[0], 30)
        core, counted = planned.llm.llm_engine, set()
        schedule = planned.builders[0].planner.planners[0].schedule
        while core.has_unfinished_requests():
            core.step()
            for request in planned.scheduler.running:
                if request.num_output_tokens > 3:
                    decoded = -(-request.num_computed_tokens // S) - 700 // S
                    counted.add(held(planned)["r"] - decoded)
        course = schedule.course(700)
        assert counted <= {course.private, course.private + 1}, "the step's own"
        assert course.private in counted
        assert course.private == 4
        assert 4 * 4 - 3 * 2 == 10, "its head pages"
