"""Prompts that are packed as they come: against a plain Llama that packs at the same positions."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from tests.plain_llama import Plain
from tests.vllm.test_lifecycle import ROOMY, leave, preemptions, with_room

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32
KEYS = "keydiff(budget=96, chunk=64)"
LOTS = "random(budget=64, chunk=128)"


@pytest.mark.both
@pytest.mark.parametrize("policy", [KEYS, LOTS])
def test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions(
    engine, random_llama, prompts, policy
):
    """Steps of up to 256 tokens, shared by the requests: none, one or several events in each."""
    model = random_llama(layers=3)
    batch = prompts(300, 97, 512, 700, 160)
    with engine(
        model, {"policy": policy}, dtype="float32", enable_prefix_caching=False
    ) as planned:
        planned.poison(freed=True)
        free = planned.free_blocks
        seen = events_in_steps(planned)
        answers = planned.generate(batch, 60)
        assert planned.free_blocks == free
        alone = planned.generate(batch[3:4], 60)
    plain = Plain(model, policy, S)
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [60] * 5
    assert alone == answers[3:4]
    assert {0, 1, 2} <= set(seen), "events of one request in a step"
    dense = Plain(model, "keydiff(budget=4096)", S)
    assert all(dense.agrees(*each) < 60 for each in zip(batch[2:4], answers[2:4], strict=True))


def events_in_steps(engine) -> list[int]:
    """How many events of one request each step has at most, appended to as it happens."""
    found: list[int] = []
    planner = engine.builders[0].planner
    events = planner.events

    def count(*batch):
        seen = events(*batch)
        found.append(max((sum(e.row == f.row for f in seen) for e in seen), default=0))
        return seen

    planner.events = count
    return found


@pytest.mark.parametrize(
    "policy, caching",
    [(KEYS, True), (f"{KEYS} + twilight(budget=0.5, dense_layers=0)", False)],
)
def test_preempted_requests_are_packed_again_as_before(
    engine, random_llama, prompts, policy, caching
):
    batch = prompts(40, 333, 50, 60, 45, 35, 460)
    with engine(
        random_llama(),
        {"policy": policy},
        enable_prefix_caching=caching,
        num_gpu_blocks_override=ROOMY,
        max_model_len=1024,
        max_num_batched_tokens=128,
    ) as planned:
        planned.poison(freed=not caching)
        free = planned.free_blocks
        expected = with_room(planned, batch, 120)
        hostages, seen = leave(planned, 18), preemptions(planned)
        assert planned.generate(batch, 120) == expected
        assert len(seen) >= 3, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free
        for tokens in (1, 120):
            (again,) = planned.run(batch[1:2], tokens)
            assert list(again.outputs[0].token_ids) == expected[1][:tokens]
        assert again.num_cached_tokens == (caching and (96 + 64 - 1) // S * S), "up to its event"


def test_prompts_of_many_times_the_pool_are_served(engine, random_llama, prompts):
    """Blocks are counted where they are allocated; a large pool answers the same."""
    batch, lengths = prompts(2300, 1500, 3100), (2300, 1500, 3100)
    options = {"max_model_len": 3200, "max_num_batched_tokens": 128}
    with engine(random_llama(), {"policy": KEYS}, **options) as roomy:
        expected = roomy.generate(batch, 20)
    with engine(
        random_llama(), {"policy": KEYS}, num_gpu_blocks_override=24, **options
    ) as planned:
        free, config = planned.free_blocks, planned.llm.llm_engine.vllm_config
        assert max(lengths) > 4 * free * S
        schedule = planned.builders[0].planner.planners[0].schedule
        row, held = held_at_most(planned), {}
        assert planned.generate(batch, 20) == expected
        for request, blocks in row.items():
            held[request] = max(blocks)
        most = schedule.most_pages(3100, config.max_in_flight_tokens, 3120)
        assert most <= free
        assert len(held) == 3
        assert all(6 < blocks <= most for blocks in held.values())
        assert planned.free_blocks == free


def held_at_most(engine) -> dict[str, list[int]]:
    """By request, the blocks that it holds whenever it was given some."""
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    held: dict[str, list[int]] = {}
    allocate = manager.allocate_new_blocks

    def count(request_id, *args, **kwargs):
        given = allocate(request_id, *args, **kwargs)
        row = manager.req_to_blocks[request_id]
        held.setdefault(request_id, []).append(sum(not block.is_null for block in row))
        return given

    manager.allocate_new_blocks = count
    return held


def test_requests_with_and_without_a_chunk_share_a_batch(engine, random_llama, prompts):
    batch = prompts(300, 333, 97, 230)
    lines = [KEYS, "keydiff(budget=96)", "dense", "keydiff(budget=96, interval=64)"]
    with engine(
        random_llama(), {"policy": "dense", "allow": ["keydiff"], "max_budget": 128},
        max_model_len=1024,
    ) as planned:  # fmt: skip
        planned.poison(freed=False)

        def ask(which):
            given = [
                SamplingParams(
                    temperature=0, max_tokens=100, ignore_eos=True, detokenize=False,
                    extra_args={"kvplug": lines[n]},
                )
                for n in which
            ]  # fmt: skip
            said = planned.llm.generate(
                [{"prompt_token_ids": batch[n]} for n in which], given, use_tqdm=False
            )
            return [list(each.outputs[0].token_ids) for each in said]

        alone = []
        for n in range(4):
            planned.forget()
            alone += ask([n])
        planned.forget()
        assert ask(range(4)) == alone
        assert ask(range(4)) == alone, "nothing of a packed prompt was found by another"
        planned.generate(batch[:1], 1)
        (dense,) = planned.run(batch[:1], 1)
        assert dense.num_cached_tokens == 288, "its own"
    model = random_llama()
    for n, line in enumerate(lines):
        policy = line if n != 2 else "keydiff(budget=4096)"
        assert Plain(model, policy, S).agrees(batch[n], alone[n]) == 100


SHARE = "keydiff(budget=0.25, chunk=128)"


@pytest.mark.both
@pytest.mark.parametrize("policy", [SHARE, "random(budget=0.5, chunk=64, sinks=0)"])
def test_chunks_packed_where_they_lie_are_those_of_a_plain_llama(
    engine, random_llama, prompts, policy
):
    model = random_llama(layers=3)
    batch = prompts(300, 97, 512, 700, 160)
    with engine(model, {"policy": policy}, enable_prefix_caching=False) as planned:
        planned.poison(freed=True)
        free = planned.free_blocks
        seen = events_in_steps(planned)
        answers = planned.generate(batch, 60)
        assert planned.free_blocks == free
        assert planned.generate(batch[3:4], 60) == answers[3:4]
        planned.generate(batch[1:2], 1)
    plain = Plain(model, policy, S)
    assert [plain.agrees(*each) for each in zip(batch, answers, strict=True)] == [60] * 5
    assert {0, 1, 2} <= set(seen), "events of one request in a step"
    dense = Plain(model, "keydiff(budget=4096)", S)
    assert all(dense.agrees(*each) < 60 for each in zip(batch[2:4], answers[2:4], strict=True))


@pytest.mark.both
def test_what_was_packed_is_found_by_who_comes_with_its_prefix(engine, random_llama, prompts):
    """Whole chunks, by the next turn, by another who shares some of them, and by nobody else;
    with the answers of an empty cache."""
    model, (first, second, question, other) = random_llama(layers=3), prompts(700, 520, 40, 90)
    with engine(model, {"policy": SHARE}) as planned:
        planned.poison(freed=False)
        free = planned.free_blocks

        def ask(prompt):
            (said,) = planned.run([prompt], 40)
            return list(said.outputs[0].token_ids), said.num_cached_tokens

        answer, cached = ask(first)
        assert cached == 0
        asked = {
            "turn": (first + answer + question, 640),
            "shares 600": (first[:600] + other, 512),
            "last token of a chunk differs": ([*first[:511], first[511] + 1, *other], 384),
            "ends at an event": (first[:513], 512),
            "one token short of it": (first[:512], 384),
            "nothing in common": (second, 0),
        }
        warm = {name: ask(prompt) for name, (prompt, _) in asked.items()}
        assert {name: cached for name, (_, cached) in warm.items()} == {
            name: cached for name, (_, cached) in asked.items()
        }
        assert planned.free_blocks == free
        held = sum(block.block_hash is not None for block in planned.pool.blocks)
        assert held <= 5 + 1 + 4 + 4, "one block a chunk, of each prefix that ran"
        for name, (prompt, _) in asked.items():
            planned.forget()
            assert ask(prompt) == (warm[name][0], 0), name
        planned.forget()
        planned.generate([first[:512]], 1)
        assert ask(first[:512] + other)[1] == 512, "though it ended with the step that packs"
        packed = ask(first + answer + question)[0]
        # What leaves the pool shortens the hit to the chunk before.
        hostages = planned.pool.get_new_blocks(planned.free_blocks)
        planned.pool.free_blocks(hostages)
        assert ask(first + answer + question) == (packed, 0)
    plain = Plain(model, SHARE, S)
    assert plain.agrees(first, answer) == 40
    assert all(plain.agrees(asked[name][0], warm[name][0]) == 40 for name in asked)


def test_a_shared_context_costs_its_packed_size_once(engine, random_llama, prompts):
    """Eight clients over one context, three turns each, in a pool that holds no dense copy of
    it; preempted and aborted on the way."""
    context, *questions = prompts(1280, *[30 + n for n in range(8)])
    options = {"max_model_len": 2048, "max_num_batched_tokens": 128}
    with engine(
        random_llama(), {"policy": SHARE}, num_gpu_blocks_override=29, **options
    ) as planned:
        free = planned.free_blocks
        assert len(context) > free * S, "dense, it would not fit"
        seen = preemptions(planned)
        planned.generate([context], 1)
        turns = [context + question for question in questions]
        first = planned.generate(turns, 30)
        again = planned.run(
            [a + b + q for a, b, q in zip(turns, first, questions, strict=True)], 30
        )
        assert min(each.num_cached_tokens for each in again) >= 1280 - 128
        assert len(seen) >= 1
        assert planned.free_blocks == free
    with engine(random_llama(), {"policy": SHARE}, **options) as roomy:
        assert roomy.generate(turns, 30) == first
