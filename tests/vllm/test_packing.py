"""Packed prompts in vLLM's own block pool: ``test_manager``'s schedules, with rows that shift.

No engine starts. ``Packed`` keeps a shadow of what every block holds: packing happens in the step
that passes a prompt's end, and from then on the prompt's whole pages need not be there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvplug import Settings, parse, read_offer
from kvplug_vllm.packing import PackingManager, PackingSpec
from kvplug_vllm.placing import PlacingSpec
from kvplug_vllm.settings import EvictionSettings
from tests.core.test_schedule import eras
from tests.vllm.test_manager import (
    SHAPE,
    S,
    Schedule,
    cached_pages,
    document,
    event,
    overwrite,
    play,
    seen_from,
    to_come,
)

SNAPKV = "snapkv(budget=64, window=16)"
KNORM = "knorm(budget=64)"
POLICIES = [
    SNAPKV, "snapkv(budget=50, window=37)", KNORM, "knorm(budget=24)",
    "snapkv(budget=50, window=20, interval=30)", "knorm(budget=24, interval=16)",
]  # fmt: skip


def packing_spec(policy, budget=None, **given) -> PackingSpec:
    """budget: of the spec's layers, where the policy's layers differ."""
    offer = read_offer({"policy": policy, **given}, environ={})
    return PackingSpec(
        settings=EvictionSettings.of(offer),
        private_blocks=-(-(budget or offer.max_tokens) // S),
        budget=budget,
        **SHAPE,
    )


def engine(max_len):
    """What a spec reads of vLLM's configuration."""
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_len), parallel_config=parallel
    )


def least_blocks(spec, max_len) -> int:
    """What vLLM asks of a pool before it starts."""
    blocks, rest = divmod(spec.max_memory_usage_bytes(engine(max_len)), spec.page_size_bytes)
    assert not rest
    return blocks


def policy_of(spec, request):
    """What a request is compressed by, read from its line alone; None for what stays whole."""
    line = (request.sampling_params.extra_args or {}).get("kvplug", spec.settings.policy)
    return settings_of(line, 0, True).policy.scored


def events_of(spec, request) -> list[tuple[int, int, int]]:
    """Position, pages packed by then and private pages written, of each event of a request."""
    if isinstance(spec, PlacingSpec):
        whole = request.num_prompt_tokens // S
        private = spec.private_blocks + -(-whole // (S + 1))
        long = whole > private and request.num_prompt_tokens > spec.settings.min_context
        return [(request.num_prompt_tokens, whole, private)] if long else []
    if not isinstance(spec, PackingSpec) or (policy := policy_of(spec, request)) is None:
        return []
    asked = request.sampling_params.extra_args is not None
    line = str(replace(policy, budget=spec.budget or policy.budget))
    settings = settings_of(line, 0 if asked else spec.settings.min_context, spec.settings.shortcut)
    return eras(settings, S, request.num_prompt_tokens, 640)


@functools.cache
def settings_of(line: str, min_context: int, shortcut: bool) -> Settings:
    return Settings(policy=parse(line), min_context=min_context, shortcut=shortcut)


def private_blocks(spec, request) -> int:
    """Blocks inserted into a row, where it is packed."""
    events = events_of(spec, request)
    if not events:
        return 0
    policy = policy_of(spec, request)
    return -(-policy.budget // S) if policy and policy.interval else events[0][2]


def begin_of(spec, request) -> int:
    """Position of the first event."""
    return next((position for position, _, _ in events_of(spec, request)), 1 << 40)


def packed_pages(spec, request, processed) -> int:
    """Pages that a request does without once ``processed`` of its tokens are committed."""
    return max([0, *(pages for at, pages, _ in events_of(spec, request) if at < processed)])


def own_from(spec, request) -> int:
    """Tokens of a request that do not depend on a policy, and may be somebody else's."""
    begin = begin_of(spec, request)
    if not isinstance(spec, PackingSpec):
        return begin
    line = (request.sampling_params.extra_args or {}).get("kvplug", spec.settings.policy)
    if spec.settings.allow and line != "dense":
        return min(begin, request.num_prompt_tokens)
    return begin


def last_hit(spec, request) -> int:
    """The queries that packing needs come in one stay: the window's, and one behind the prompt."""
    policy = policy_of(spec, request)
    last = policy.window if policy.name == "snapkv" else 1
    return max(begin_of(spec, request) - last, 0)


@dataclass(frozen=True)
class Own:
    """Content that is nobody else's: packed tokens, and what was decoded behind them."""

    stay: tuple[str, int]
    tokens: tuple[int, ...]


class Packed(Schedule):
    """A schedule whose first group packs."""

    def stay(self, request):
        return request.request_id, len(self.hits[request.request_id])

    def _write(self, request, new):
        start, tokens = request.num_computed_tokens, to_come(request)
        for group, spec, row in self.rows(request):
            private, column = private_blocks(spec, request), -(-begin_of(spec, request) // S)
            for page in range(start // S, (start + new - 1) // S + 1):
                block = row[page + (private if page >= column else 0)]
                assert not block.is_null, "a page is written to the null block"
                filled = min((page + 1) * S, start + new)
                if filled > own_from(spec, request):
                    assert block.ref_cnt == 1
                    assert block.block_hash is None
                    self.content[group, block.block_id] = Own(self.stay(request), tokens[:filled])
                else:
                    assert block.ref_cnt == 1 or filled == (page + 1) * S
                    self.content[group, block.block_id] = tokens[:filled]

    def _check_reads(self, request, new):
        tokens, own = to_come(request), self.stay(request)
        start, end = request.num_computed_tokens, request.num_computed_tokens + new
        for group, spec, row in self.rows(request):
            events, private = events_of(spec, request), private_blocks(spec, request)
            begin = begin_of(spec, request)
            column = -(-begin // S)
            assert len(row) == -(-end // S) + private * (end > begin)

            def holds(block, wanted, group=group):
                assert not block.is_null
                held = self.content[group, block.block_id]
                assert (held.tokens if isinstance(held, Own) else held) == wanted
                assert not isinstance(held, Own) or held.stay == own

            def page_at(page, row=row, column=column, private=private):
                return row[page + (private if page >= column else 0)]

            if not events:
                for page in seen_from(spec, start, end):
                    holds(row[page], tokens[: min((page + 1) * S, end)])
                continue
            gone = packed_pages(spec, request, start - request.num_in_flight_tokens)
            for page in range(-(-end // S)):
                assert page_at(page).is_null == (page < gone), (page, gone)

            def reads(
                era, last, row=row, column=column, events=events, page_at=page_at, group=group
            ):
                """What queries of an era up to position `last` find in place of what it packed."""
                at, pages, kept = events[era] if era >= 0 else (0, 0, 0)
                for block in row[column : column + kept]:
                    assert self.content[group, block.block_id] == Own(
                        own, ("kept", era, *tokens[:at])
                    )
                for page in range(pages, -(-last // S)):
                    holds(page_at(page), tokens[: min((page + 1) * S, end)])

            era = max([-1, *(n for n, (at, _, _) in enumerate(events) if at < start)])
            reads(era, min([end, *(at for at, _, _ in events[era + 1 :])]))
            for number, (at, pages, kept) in enumerate(events):
                if not start <= at < end:
                    continue
                before = events[number - 1] if number else (0, 0, 0)
                for page in range(before[1], pages):  # packed in this step
                    holds(page_at(page), tokens[: min((page + 1) * S, end)])
                for block in row[column : column + kept]:
                    said = Own(own, ("kept", number, *tokens[:at]))
                    self.content[group, block.block_id] = said
                reads(number, min([end, *(each for each, _, _ in events[number + 1 :])]))

    def _check_hit(self, request, groups, hit):
        tokens = tuple(request.all_token_ids)
        for group, found in enumerate(groups):
            spec = self.specs[group]
            if isinstance(spec, PackingSpec) and policy_of(spec, request):
                assert hit <= last_hit(spec, request)
            assert len(found) == hit // S
            for page, block in enumerate(found):
                if isinstance(spec, PackingSpec):
                    assert not block.is_null
                if not block.is_null:
                    assert self.content[group, block.block_id] == tokens[: (page + 1) * S]

    def check(self):
        for block in self.pool.blocks:
            if block.block_hash is not None and not block.is_null:
                held = self.content[get_group_id(block.block_hash), block.block_id]
                assert not isinstance(held, Own), "hashed for others to find"
        super().check()
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(set(free)) == len(free) == self.pool.get_num_free_blocks()
        for request in self.running:
            for _, spec, row in self.rows(request):
                if isinstance(spec, PackingSpec):
                    self.check_row(request, spec, row)

    def check_row(self, request, spec, row):
        computed, begin = request.num_computed_tokens, begin_of(spec, request)
        private, column = private_blocks(spec, request), -(-begin // S)
        width = spec.max_num_blocks_per_req(engine(self.max_model_len), self.max_model_len)
        assert len(row) <= width
        assert len(row) == -(-computed // S) + private * (computed > begin)
        held = [block for block in row if not block.is_null]
        assert len({block.block_id for block in held}) == len(held)
        for block in row[column:]:  # private and decoded
            assert block.is_null or (block.ref_cnt == 1 and block.block_hash is None)
        committed = computed - request.num_in_flight_tokens
        packed = {pages for at, pages, _ in events_of(spec, request) if at < committed}
        assert len(row) - len(held) in {0, *packed}, "freed before it was packed"

    def drain(self, steps=2000):
        super().drain(steps)
        for manager in self.manager.coordinator.single_type_managers:
            assert not manager.req_to_blocks
            assert not manager.num_cached_block
            assert not getattr(manager, "held", None)


def packed(policy=SNAPKV, blocks=200, chunk=64, ahead=1, max_len=512, **given) -> Packed:
    return Packed([packing_spec(policy, **given)], blocks, chunk, ahead, max_len)


def decode(schedule, request, tokens) -> None:
    """Until the request has so many output tokens."""
    while request.num_output_tokens < tokens:
        schedule.step()


def test_vllm_builds_our_manager_for_our_spec():
    spec = packing_spec(SNAPKV)
    (manager,) = Packed([spec], 8).manager.coordinator.single_type_managers
    assert isinstance(manager, PackingManager)
    assert least_blocks(spec, 512) == 512 // S + 4
    assert spec.max_num_blocks_per_req(engine(500), 500) == -(-500 // S) + 4


# Any schedule.

policies = st.sampled_from(POLICIES)
options = st.fixed_dictionaries(
    {
        "min_context": st.sampled_from([0, 0, 128]),
        "shortcut": st.sampled_from([True, True, False]),
    }
)
events = st.lists(event, min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    policies,
    options,
    events,
    st.integers(0, 60),
    st.sampled_from([16, 40, 64, 300]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_no_schedule_leaks_a_block_or_shares_one_that_is_private(
    policy, options, events, spare, chunk, ahead, must_fit
):
    spec = packing_spec(policy, **options)
    blocks = least_blocks(spec, 320) + spare
    play(Packed([spec], blocks, chunk, ahead, max_model_len=320, must_fit=must_fit), events)


@settings(max_examples=100, deadline=None)
@given(policies, options, events, st.integers(0, 60), st.sampled_from([16, 30, 100]))
def test_nor_does_one_beside_the_models_own_windowed_layers(
    policy, options, events, spare, window
):
    spec = packing_spec(policy, **options)
    windowed = SlidingWindowSpec(sliding_window=window, **SHAPE)
    cap = windowed.max_admission_blocks_per_request(64, 320)
    blocks = least_blocks(spec, 320) + cap + spare
    play(Packed([spec, windowed], blocks, 64, max_model_len=320), events)


ASKED = [
    None, "dense", "quest(budget=32)", KNORM, "knorm(budget=96)", "snapkv(budget=32, window=20)",
    "snapkv(budget=80, window=16) + quest(budget=32)", "knorm(budget=32, interval=40)",
]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.sampled_from(ASKED), min_size=2),
    st.sampled_from([True, True, False]),
    events,
    st.integers(0, 60),
    st.sampled_from([16, 40, 300]),
    st.sampled_from([1, 2]),
)
def test_nor_does_one_of_requests_with_policies_of_their_own(
    asks, shortcut, events, spare, chunk, ahead
):
    spec = packing_spec(
        KNORM, allow=["snapkv", "knorm", "quest"], max_budget=100, shortcut=shortcut
    )
    assert spec.private_blocks == 7
    blocks = least_blocks(spec, 320) + spare
    play(Packed([spec], blocks, chunk, ahead, max_model_len=320, asks=asks), events)


@settings(max_examples=100, deadline=None)
@given(options, events, st.integers(0, 60), st.sampled_from([16, 40, 300]))
def test_nor_does_one_whose_layers_keep_different_budgets(options, events, spare, chunk):
    line = "pyramid(snapkv(budget=64, window=16))"
    specs = [packing_spec(line, budget, **options) for budget in (100, 64, 28)]
    blocks = sum(least_blocks(spec, 320) for spec in specs) + spare
    schedule = Packed(specs, blocks, chunk, max_model_len=320)
    assert isinstance(schedule.manager.coordinator, HybridKVCacheCoordinator)
    play(schedule, events)


@settings(max_examples=40, deadline=None)
@given(policies, options, events, st.integers(0, 60))
def test_nor_does_one_without_a_prefix_cache(policy, options, events, spare):
    spec = packing_spec(policy, **options)
    blocks = least_blocks(spec, 320) + spare
    schedule = play(Packed([spec], blocks, max_model_len=320, caching=False), events)
    assert not any(hit for hits in schedule.hits.values() for hit in hits)


@settings(max_examples=60, deadline=None)
@given(
    policies,
    st.booleans(),
    st.integers(60, 200),
    st.integers(1, 60),
    st.integers(0, 260),
    st.sampled_from(["finish", "preempt"]),
    st.sampled_from([1, 2]),
)
def test_one_request_is_cut_off_at_any_point(
    policy, shortcut, prompt, answer, computed, how, ahead
):
    schedule = packed(policy, chunk=40, ahead=ahead, shortcut=shortcut)
    request = schedule.add(document(prompt), max_tokens=answer)
    other = schedule.add(document(prompt), max_tokens=answer)
    while request in schedule.waiting or (
        request in schedule.running and request.num_computed_tokens < computed
    ):
        schedule.step()
    if request in schedule.running:
        while how == "preempt" and schedule.in_flight:
            schedule.process()
        if request in schedule.running:
            getattr(schedule, how)(request)
    schedule.check()
    schedule.drain()
    assert schedule.hits[other.request_id]


# The row, step by step.


@pytest.mark.parametrize("prompt", [79, 80, 81, 95, 96, 100])
@pytest.mark.parametrize("shortcut", [True, False])
def test_the_row_of_one_request(prompt, shortcut):
    schedule = packed(KNORM, shortcut=shortcut)
    whole, ends = prompt // S, -(-prompt // S)
    private = 4 if whole > 4 or not shortcut else 0
    request = schedule.add(document(prompt), max_tokens=40)
    before = schedule.pool.get_num_free_blocks()

    def row():
        return next(row for _, _, row in schedule.rows(request))

    while request.num_computed_tokens < prompt:
        schedule.step()
    assert len(row()) == ends, "no private block before the first token behind the prompt"
    pages = list(row())
    schedule.step()
    assert len(row()) == -(-(prompt + 1) // S) + private
    assert row()[:ends] == pages, "the prompt's pages stay for as long as they are packed"
    schedule.step()
    if not private:
        assert row()[:ends] == pages
    else:
        assert all(block.is_null for block in row()[:whole])
        assert row()[whole:ends] == pages[whole:]
        assert all(block.block_hash is not None for block in pages[:whole]), "hits still find it"
    decode(schedule, request, 30)
    held = -(-request.num_computed_tokens // S) - whole + private if private else len(row())
    assert before - schedule.pool.get_num_free_blocks() == held
    schedule.drain()


def test_what_a_prompt_frees_serves_others():
    schedule = packed(KNORM, blocks=34, max_len=400)
    first = schedule.add(document(384), max_tokens=16)  # 24 + 4 of 34 blocks, then 4 + 1
    decode(schedule, first, 3)
    second = schedule.add(document(384, seed=1), max_tokens=4)
    schedule.step()
    assert second not in schedule.waiting
    schedule.drain()
    assert schedule.preemptions == 0


# What a prefix lookup finds.


@pytest.mark.parametrize("policy", [SNAPKV, KNORM])
@pytest.mark.parametrize("prompt", [81, 96, 150, 160, 300])
@pytest.mark.parametrize("shortcut", [True, False])
def test_the_next_turn_hits_every_whole_page_of_the_prompt(policy, prompt, shortcut):
    schedule = packed(policy, shortcut=shortcut)
    first = schedule.add(document(prompt), max_tokens=40)
    schedule.drain()
    turn = [*first.all_token_ids, *range(10)]
    assert set(cached_pages(schedule, turn)) == set(range(prompt // S)), "and no page of decoding"
    assert schedule.serve(turn) == prompt // S * S


def test_and_does_so_while_the_first_one_is_still_decoding():
    schedule = packed(SNAPKV)
    first = schedule.add(document(160), max_tokens=40)
    decode(schedule, first, 5)
    second = schedule.add([*first.all_token_ids, *range(30)], max_tokens=4)
    schedule.step()
    assert schedule.hits[second.request_id] == [160]
    schedule.drain()


def test_freed_pages_are_found_until_they_are_overwritten():
    schedule = packed(SNAPKV)
    first = schedule.add(document(300), max_tokens=40)
    schedule.drain()
    pages = cached_pages(schedule, first.all_token_ids)
    overwrite(schedule, [pages[page] for page in (*range(7), *range(8, 18))])
    assert schedule.serve([*first.all_token_ids, 1]) == 7 * S


@pytest.mark.parametrize(
    "policy, prompt, hit",
    [
        (SNAPKV, 176, 160),  # 176 - 16
        (SNAPKV, 175, 144),
        (SNAPKV, 80, 64),
        (SNAPKV, 79, 64),  # stays whole: nothing asks for its queries
        ("snapkv(budget=64, window=37)", 200, 160),
        ("snapkv(budget=64, window=64)", 80, 16),
        (KNORM, 176, 160),
        (KNORM, 177, 176),
    ],
)
def test_an_identical_prompt_leaves_the_queries_that_a_score_needs(policy, prompt, hit):
    schedule = packed(policy)
    schedule.serve(document(prompt))
    assert schedule.serve(document(prompt)) == hit
    twice = [schedule.add(document(prompt), max_tokens=4) for _ in range(2)]
    schedule.drain()
    assert [schedule.hits[request.request_id] for request in twice] == [[hit], [hit]]


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize(
    "policy, prompt, hit",
    [
        (SNAPKV, 176, 160),
        (SNAPKV, 170, 144),
        ("snapkv(budget=64, window=37)", 200, 160),
        (KNORM, 170, 160),
        (KNORM, 161, 160),
    ],
)
def test_a_resumed_request_computes_its_prompts_end_again(policy, prompt, hit, longer):
    """Even where another request, whose prompt goes on as this one did, left further pages."""
    schedule = packed(policy)
    request = schedule.add(document(prompt), max_tokens=60)
    decode(schedule, request, 40)
    schedule.preempt(request)
    schedule.waiting.remove(request)
    if longer:
        schedule.serve([*request.all_token_ids, *range(40)])
        assert len(cached_pages(schedule, request.all_token_ids)) == (prompt + 40) // S
    schedule.waiting.append(request)
    schedule.drain()
    assert schedule.hits[request.request_id] == [0, hit]


def test_a_resumed_request_that_stays_whole_finds_all_it_decoded():
    schedule = packed(SNAPKV)
    request = schedule.add(document(70), max_tokens=60)
    decode(schedule, request, 42)
    schedule.preempt(request)
    schedule.drain()
    assert schedule.hits[request.request_id] == [0, (70 + 41) // S * S]


# Room.


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk, ahead", [(16, 1), (50, 2), (512, 1)])
@pytest.mark.parametrize("max_len", [128, 175, 176, 177])
def test_a_pool_of_the_least_size_serves_a_request_of_any_length(policy, chunk, ahead, max_len):
    """vLLM sizes the pool for one request of full length; with it the engine must not stall."""
    spec = packing_spec(policy)
    width = spec.max_num_blocks_per_req(engine(max_len), max_len)
    for prompt in (1, 70, 80, max_len - 17, max_len - 16, max_len - 2, max_len - 1):
        schedule = Packed([spec], least_blocks(spec, max_len), chunk, ahead, max_len)
        schedule.serve(document(prompt), max_tokens=max_len)
        assert schedule.preemptions == 0
    # And a resumed one, whose whole row is allocated at once.
    request = schedule.add(document(90), max_tokens=max_len)
    while request.num_tokens < max_len - 1:
        schedule.step()
    while schedule.in_flight:
        schedule.process()
    if request in schedule.running:
        schedule.preempt(request)
        schedule.step()
        row = next(row for _, _, row in schedule.rows(request))
        assert len(row) <= width
    schedule.drain()


@pytest.mark.parametrize("prompt", [80, 100, 112, 150])
@pytest.mark.parametrize("policy", [SNAPKV, KNORM])
def test_admission_counts_the_private_blocks(policy, prompt):
    needed = -(-prompt // S) + 4
    short = packed(policy, blocks=needed - 1)
    request = short.add(document(prompt), max_tokens=2)
    for _ in range(5):
        short.step()
    assert short.waiting == [request]
    assert not short.preemptions, "at its prompt's end, again and again"
    assert not short.hits, "it was never let in"
    short.finish(request)
    short.check()
    short.drain()

    enough = packed(policy, blocks=-(-(prompt + 1) // S) + 4)
    enough.serve(document(prompt), max_tokens=S - prompt % S)
    assert enough.preemptions == 0


def test_a_prompt_within_the_budget_needs_no_more_room_than_full_attention():
    for spec in (packing_spec(SNAPKV), FullAttentionSpec(**SHAPE)):
        schedule = Packed([spec], 5, 64)
        schedule.serve(document(79), max_tokens=2)
        assert schedule.preemptions == 0


def test_two_requests_that_outgrow_the_pool_take_turns():
    spec = packing_spec(KNORM)
    schedule = Packed([spec], least_blocks(spec, 160), 64, max_model_len=160)
    requests = [schedule.add(document(60, seed), max_tokens=99) for seed in range(3)]
    requests += [schedule.add(document(100, seed), max_tokens=59) for seed in range(3)]
    schedule.drain()
    assert schedule.preemptions
    assert [request.num_tokens for request in requests] == [159] * 6


def test_a_request_hits_what_its_own_policy_leaves_it():
    """One server, one prompt of 160 tokens: a window's queries are computed for snapkv alone."""
    spec = packing_spec(KNORM, allow=["snapkv", "quest"])
    schedule = Packed([spec], 200)
    tokens = document(160)
    schedule.serve(tokens, max_tokens=20)
    hits = {}
    for line in (None, "dense", "quest(budget=32)", "snapkv(budget=64, window=20)"):
        request = schedule.add(tokens, max_tokens=40, asks=line)
        schedule.drain()
        hits[line] = schedule.hits[request.request_id][0]
    assert list(hits.values()) == [144, 144, 144, 128]


def test_an_answer_is_shared_only_where_no_policy_touched_it():
    spec = packing_spec(KNORM, allow=["quest"])
    for line, shared in (("dense", 192), ("quest(budget=32)", 160), (KNORM, 160)):
        schedule = Packed([spec], 200)
        first = schedule.add(document(160), max_tokens=40, asks=line)
        schedule.drain()
        turn = schedule.add([*first.all_token_ids, 1, 2], max_tokens=2, asks="dense")
        schedule.drain()
        assert schedule.hits[turn.request_id] == [shared], line


@pytest.mark.parametrize("prompt, hit", [(300, 272), (284, 256), (320, 304)])
def test_layers_of_different_budgets_hit_together(prompt, hit):
    line = "pyramid(snapkv(budget=64, window=16))"
    specs = [packing_spec(line, budget) for budget in (100, 64, 28)]
    schedule = Packed(specs, 300)
    schedule.serve(document(prompt), max_tokens=30)
    request = schedule.add(document(prompt), max_tokens=30)
    decode(schedule, request, 4)
    rows = [sum(not block.is_null for block in row) for _, _, row in schedule.rows(request)]
    decoded = -(-request.num_computed_tokens // S) - prompt // S
    assert rows == [blocks + decoded for blocks in (7, 4, 2)]
    schedule.drain()
    assert schedule.hits[request.request_id] == [hit]
