"""Eviction in vLLM's own block pool: its real manager and requests, driven as its scheduler does.

No engine starts. ``Schedule`` makes the scheduler's calls in the scheduler's order, keeps a shadow
of what every block's memory holds, and checks after each step what must never break.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from kvplug import Planner, parse, read_offer, read_settings
from kvplug_vllm.settings import EvictionSettings
from kvplug_vllm.streaming import EvictingManager, EvictingSpec

S, LONGEST = 16, 512
SHAPE = {"block_size": S, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
init_none_hash(sha256)


def evicting_spec(policy, in_flight, **given) -> EvictingSpec:
    read = read_offer({"policy": policy, **given}, environ={})
    return EvictingSpec(
        settings=EvictionSettings.of(read),
        in_flight=in_flight,
        **SHAPE,
    )


class Schedule:
    """A scheduler that waits for each step, or runs ``ahead`` before it processes the first."""

    def __init__(
        self,
        specs,
        blocks,
        chunk=64,
        ahead=1,
        max_model_len=LONGEST,
        must_fit=True,
        caching=True,
        asks=(),
        eagle=False,
    ):
        """asks: what requests ask of kvplug, in turn."""
        self.asks = asks
        self.manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=blocks + 1,  # and the null block
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec([str(i)], s) for i, s in enumerate(specs)],
            ),
            max_model_len=max_model_len,
            scheduler_block_size=S,
            hash_block_size=S,
            max_in_flight_tokens=chunk * ahead,
            use_eagle=eagle,
            enable_caching=caching,
        )
        self.pool = self.manager.block_pool
        self.specs, self.blocks, self.chunk, self.ahead = specs, blocks, chunk, ahead
        self.max_model_len, self.must_fit = max_model_len, must_fit
        self.hasher = get_request_block_hasher(S, sha256)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.in_flight: list[list[tuple[Request, int]]] = []
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}
        """(group, block) -> the prefix of which the block holds the last S tokens or fewer."""
        self.hits: dict[str, list[int]] = {}
        self.names = itertools.count()
        self.preemptions = 0

    def add(self, tokens, max_tokens=8, asks=None) -> Request:
        number = next(self.names)
        if asks is None and self.asks:
            asks = self.asks[number % len(self.asks)]
        request = Request(
            request_id=str(number),
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, extra_args=None if asks is None else {"kvplug": asks}
            ),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.waiting.append(request)
        return request

    # The scheduler's step: schedule the running, then the waiting, then process an old step.

    def step(self) -> int:
        """Tokens scheduled."""
        self.manager.new_step_starts()
        budget, scheduled, preempted = self.chunk, [], False
        hits = []
        index = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            new = min(self._left(request), budget)
            if new:
                while (blocks := self.manager.allocate_slots(request, new)) is None:
                    victim = self.running[-1]
                    budget += sum(n for r, n in scheduled if r is victim)
                    scheduled = [(r, n) for r, n in scheduled if r is not victim]
                    self.preempt(victim)
                    preempted = True
                    if victim is request:
                        break
                if blocks is None:
                    break
                scheduled.append((request, new))
                budget -= new
            index += 1
        while self.waiting and budget and not preempted:
            request = self.waiting[0]
            found, hit, boundary = self.manager.get_computed_blocks(request)
            assert hit % S == 0
            assert hit < request.num_tokens
            request.shared_prefix_boundary = boundary
            new = min(request.num_tokens - hit, budget)
            taken = self.manager.allocate_slots(
                request,
                new,
                num_new_computed_tokens=hit,
                new_computed_blocks=found,
                full_sequence_must_fit=self.must_fit,
                has_scheduled_reqs=bool(self.running),
            )
            if taken is None:
                break
            self.waiting.remove(request)
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = hit
            hits.append((request, found.blocks, hit))
            self.hits.setdefault(request.request_id, []).append(hit)
            scheduled.append((request, new))
            budget -= new
        for request, new in scheduled:
            self._write(request, new)
        for lookup in hits:  # now, because a page may be hit in the step that writes it
            self._check_hit(*lookup)
        for request, new in scheduled:
            self._check_reads(request, new)
            request.num_computed_tokens += new
            request.num_in_flight_tokens += new
            if request.num_computed_tokens == request.num_tokens + request.num_output_placeholders:
                request.num_output_placeholders += 1
        self.in_flight.append(scheduled)
        self.check()
        if len(self.in_flight) >= self.ahead:
            self.process()
        return sum(new for _, new in scheduled)

    def _left(self, request) -> int:
        """Tokens that a running request may compute now, outputs on their way included."""
        coming = request.num_output_placeholders
        if coming and request.num_output_tokens + coming >= request.max_tokens:
            return 0
        length = min(request.num_tokens + coming, self.max_model_len)
        return length - request.num_computed_tokens

    def process(self) -> None:
        """Output of the oldest step: a token for each request that has computed all it has."""
        for request, new in self.in_flight.pop(0):
            request.num_in_flight_tokens -= new
            if request not in self.running or not request.num_output_placeholders:
                continue
            done = request.num_computed_tokens - request.num_in_flight_tokens
            if done < request.num_tokens:
                continue
            request.append_output_token_ids(next_token(request.all_token_ids))
            request.num_output_placeholders -= 1
            self.manager.cache_blocks(
                request, request.num_computed_tokens - request.num_output_placeholders
            )
            full = request.num_tokens >= self.max_model_len
            if full or request.num_output_tokens >= request.max_tokens:
                self.finish(request)
        self.check()

    def preempt(self, request) -> None:
        self.running.remove(request)
        self.manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_output_placeholders = 0  # the output on its way is dropped, and decoded again
        self.waiting.insert(0, request)
        self.preemptions += 1

    def finish(self, request) -> None:
        """Also an abort: at any time, in any state."""
        if request in self.running:
            # As the scheduler does for a connector; vLLM frees behind it.
            self.manager.remove_skipped_blocks(
                request.request_id,
                max(0, request.num_computed_tokens - request.num_in_flight_tokens),
                num_prompt_tokens=request.num_prompt_tokens,
            )
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.manager.free(request)
        request.status = RequestStatus.FINISHED_ABORTED

    def drain(self, steps=2000) -> None:
        """Serve everybody to the end; then nothing is held."""
        for _ in range(steps):
            if not self.waiting and not self.running:
                break
            if not self.step() and self.in_flight:
                self.process()
        while self.in_flight:
            self.process()
        assert not self.waiting, "a request starves in an empty pool"
        assert not self.running, "a request makes no progress"
        assert self.pool.get_num_free_blocks() == self.blocks
        assert not any(block.ref_cnt for block in self.pool.blocks if not block.is_null)

    def serve(self, tokens, max_tokens=1) -> int:
        """One request to its end -> tokens that its first lookup hit."""
        request = self.add(tokens, max_tokens)
        self.drain()
        return self.hits[request.request_id][0]

    # The shadow: what the worker would write, and what the next queries would read.

    def rows(self, request):
        for group, manager in enumerate(self.manager.coordinator.single_type_managers):
            yield group, self.specs[group], manager.req_to_blocks.get(request.request_id, [])

    def _write(self, request, new) -> None:
        start, tokens = request.num_computed_tokens, to_come(request)
        for group, _, row in self.rows(request):
            for page in range(start // S, (start + new - 1) // S + 1):
                block = row[page]
                assert not block.is_null, "a page is written to the null block"
                filled = min((page + 1) * S, start + new)
                # A page that this step fills may be hit in the same step.
                assert block.ref_cnt == 1 or filled == (page + 1) * S, "another writes it too"
                self.content[group, block.block_id] = tokens[:filled]

    def _check_reads(self, request, new) -> None:
        """Every page that a query of this step sees is there and holds this request's tokens."""
        tokens, start = to_come(request), request.num_computed_tokens
        end = start + new
        for group, spec, row in self.rows(request):
            assert len(row) == -(-end // S)
            for page in seen_from(spec, start, end):
                assert not row[page].is_null, (start, end, page)
                held = self.content[group, row[page].block_id]
                assert held == tokens[: min((page + 1) * S, end)]

    def _check_hit(self, request, groups, hit) -> None:
        """A hit returns what the request itself would have written, and all that it will read."""
        tokens = tuple(request.all_token_ids)
        for group, found in enumerate(groups):
            assert len(found) == hit // S
            for page, block in enumerate(found):
                if not block.is_null:
                    assert self.content[group, block.block_id] == tokens[: (page + 1) * S]
            for page in seen_from(self.specs[group], hit, hit + 1):
                assert page == hit // S or not found[page].is_null

    def check(self) -> None:
        """What must hold between any two steps."""
        users: Counter[int] = Counter()
        owner: dict[int, int] = {}
        for request in self.running:
            for group, spec, row in self.rows(request):
                held = [block for block in row if not block.is_null]
                users.update(block.block_id for block in held)
                for block in held:
                    assert owner.setdefault(block.block_id, group) == group
                if isinstance(spec, EvictingSpec):
                    assert len(held) <= spec.most_blocks(LONGEST)
        for request in self.waiting:
            assert not any(row for _, _, row in self.rows(request))
        for block in self.pool.blocks:
            if block.is_null:
                continue
            assert block.ref_cnt == users[block.block_id]
            if block.block_hash is not None:
                group = get_group_id(block.block_hash)
                tokens = self.content[group, block.block_id]
                assert len(tokens) % S == 0
                assert get_block_hash(block.block_hash) == self.hash_of(tokens)
        assert self.pool.get_num_free_blocks() + len(users) == self.blocks

    def hash_of(self, tokens, _known={}):  # noqa: B006 -- a cache
        if tokens not in _known:
            request = Request("", list(tokens), SamplingParams(), None, block_hasher=self.hasher)
            _known[tokens] = request.block_hashes[-1]
        return _known[tokens]


def seen_from(spec, start, end) -> list[int]:
    """Pages that any of the queries [start, end) reads, by the definition of what it sees."""
    pages = range((end - 1) // S + 1)
    if not isinstance(spec, EvictingSpec):
        window = getattr(spec, "sliding_window", None) or end
        return [page for page in pages if (page + 1) * S > start - window + 1]
    (policy,) = parse(spec.settings.policy)
    if start < spec.settings.min_context:
        return list(pages)
    spans = [(0, policy.sinks), *spec.settings.protect]
    return [
        page
        for page in pages
        if (page + 1) * S > start - policy.window + 1
        or any(a < (page + 1) * S and page * S < b for a, b in spans)
    ]


def next_token(tokens) -> int:
    """Greedy decoding: the same prefix goes on in the same way."""
    return (sum(tokens[-5:]) * 7 + len(tokens)) % 50


def to_come(request) -> tuple[int, ...]:
    """A request's tokens, and those that a step before this one is still computing."""
    tokens = list(request.all_token_ids)
    for _ in range(request.num_output_placeholders):
        tokens.append(next_token(tokens))
    return tuple(tokens)


def document(n, seed=0) -> list[int]:
    return [(i * i + 31 * seed + i // 7) % 50 for i in range(n)]


def test_vllm_builds_our_manager_for_our_spec():
    spec = evicting_spec("streaming_llm", 64)
    one = Schedule([spec], 8)
    assert isinstance(one.manager.coordinator.single_type_managers[0], EvictingManager)
    two = Schedule([spec, SlidingWindowSpec(sliding_window=64, **SHAPE)], 8)
    assert isinstance(two.manager.coordinator, HybridKVCacheCoordinator)


# Any schedule.

policies = st.builds(
    lambda sinks, window: f"streaming_llm(sinks={sinks}, window={window})",
    st.sampled_from([0, 1, 4, 17, 40]),
    st.sampled_from([1, 16, 20, 48, 100]),
)
options = st.fixed_dictionaries(
    {
        "min_context": st.sampled_from([0, 0, 50, 128]),
        "protect": st.sampled_from([0, 20, [[40, 60]], [[0, 5], [100, 140]]]),
    }
)
prompt = st.tuples(  # which document, how much of it, then how much of one's own
    st.integers(0, 2), st.sampled_from([0, 1, 16, 33, 64, 100, 150, 220]), st.integers(1, 30)
)
event = st.one_of(
    prompt.map(lambda p: ("add", p)),
    prompt.map(lambda p: ("twice", p)),
    st.just(("step", 1)),
    st.integers(2, 6).map(lambda n: ("step", n)),
    st.integers(0, 5).map(lambda n: ("abort", n)),
    st.integers(0, 5).map(lambda n: ("preempt", n)),
    st.integers(0, 5).map(lambda n: ("go on", n)),
)


def play(schedule, events) -> Schedule:
    turns: list[list[int]] = []  # what a next turn may build on
    own = itertools.count(60)
    for kind, what in events:
        if kind in ("add", "twice"):
            which, length, tail = what
            tokens = document(length, which) + [next(own)] * tail
            for _ in range(2 if kind == "twice" else 1):
                turns.append(schedule.add(tokens, max_tokens=1 + tail)._all_token_ids)
        elif kind == "go on" and turns:
            tokens = [*turns[what % len(turns)], next(own), next(own)]
            if len(tokens) < schedule.max_model_len - 40:
                turns.append(schedule.add(tokens, max_tokens=20)._all_token_ids)
        elif kind == "step":
            for _ in range(what):
                schedule.step()
        elif kind == "abort" and (everybody := schedule.running + schedule.waiting):
            schedule.finish(everybody[what % len(everybody)])
            schedule.check()
        elif kind == "preempt" and schedule.running:
            while schedule.in_flight:
                schedule.process()
            if not schedule.running:
                continue
            schedule.preempt(schedule.running[what % len(schedule.running)])
            schedule.check()
    schedule.drain()
    return schedule


@settings(max_examples=100, deadline=None)
@given(
    policies,
    options,
    st.lists(event, min_size=1, max_size=20),
    st.integers(0, 40),
    st.sampled_from([16, 40, 64]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_no_schedule_leaks_a_block_or_loses_a_page_that_is_still_seen(
    policy, options, events, spare, chunk, ahead, must_fit
):
    spec = evicting_spec(policy, chunk * ahead, **options)
    play(
        Schedule([spec], spec.most_blocks(LONGEST) + spare, chunk, ahead, must_fit=must_fit),
        events,
    )


@settings(max_examples=120, deadline=None)
@given(
    policies,
    options,
    st.lists(event, min_size=1, max_size=20),
    st.integers(0, 60),
    st.sampled_from([16, 40, 64]),
    st.sampled_from([16, 30, 100]),
)
def test_nor_does_one_beside_the_models_own_windowed_layers(
    policy, options, events, spare, chunk, window
):
    evicting = evicting_spec(policy, chunk, **options)
    windowed = SlidingWindowSpec(sliding_window=window, **SHAPE)
    cap = windowed.max_admission_blocks_per_request(chunk, 512)
    play(
        Schedule([evicting, windowed], evicting.most_blocks(LONGEST) + cap + spare, chunk), events
    )


@settings(max_examples=40, deadline=None)
@given(policies, options, st.lists(event, min_size=1, max_size=10), st.integers(0, 20))
def test_nor_does_one_without_a_prefix_cache(policy, options, events, spare):
    spec = evicting_spec(policy, 64, **options)
    schedule = play(Schedule([spec], spec.most_blocks(LONGEST) + spare, caching=False), events)
    assert not any(hit for hits in schedule.hits.values() for hit in hits)


# What a prefix lookup finds.


def streaming(sinks, window, blocks=200, eagle=False, **given) -> Schedule:
    spec = evicting_spec(f"streaming_llm(sinks={sinks}, window={window})", 64, **given)
    return Schedule([spec], blocks, eagle=eagle)


def overwrite(schedule, pages_kept) -> None:
    """Other requests take every block whose content is not among the pages to keep."""
    kept = [b.block_id for b in pages_kept]
    schedule.pool.touch([schedule.pool.blocks[i] for i in kept])
    schedule.pool.evict_blocks(
        {b.block_id for b in schedule.pool.get_new_blocks(schedule.pool.get_num_free_blocks())}
    )
    for block in schedule.pool.blocks:
        if block.ref_cnt and not block.is_null:
            schedule.pool.free_blocks([block])
    schedule.check()


def cached_pages(schedule, tokens) -> dict[int, object]:
    """Page -> a block that holds it."""
    request = Request("", list(tokens), SamplingParams(), None, block_hasher=schedule.hasher)
    found = {
        page: schedule.pool.get_cached_block(block_hash, [0])
        for page, block_hash in enumerate(request.block_hashes)
    }
    return {page: blocks[0] for page, blocks in found.items() if blocks}


def test_a_second_turn_hits_as_long_as_possible_without_the_pages_between():
    schedule = streaming(sinks=4, window=32)
    tokens = document(300)
    schedule.serve(tokens)
    pages = cached_pages(schedule, tokens)
    assert set(pages) == set(range(300 // S)), "freed pages keep content and hash"
    # Position 288 sees tokens from 257 on: the sink page, and pages 16 and 17.
    assert Planner(read_settings({"policy": "streaming_llm(window=32)"}), S).needed(
        288
    ).tolist() == [0, 16, 17]
    overwrite(schedule, [pages[page] for page in (0, 16, 17)])
    assert set(cached_pages(schedule, tokens)) == {0, 16, 17}
    assert schedule.serve([*tokens, 1, 2, 3]) == 288


def test_beside_eagle_a_hit_is_a_block_shorter():
    """Its layers cannot take over a prefix's last block: they read the token behind it."""
    schedule = streaming(sinks=4, window=32, eagle=True)
    tokens = document(300)
    schedule.serve(tokens)
    assert schedule.serve([*tokens, 1, 2, 3]) == 288 - S
    assert schedule.serve(tokens[: S + 1]) == schedule.serve(tokens[:1]) == 0


def test_the_pages_between_are_overwritten_by_traffic_alone():
    schedule = streaming(sinks=4, window=32, blocks=24)
    tokens = document(300)
    talk = schedule.add(tokens, max_tokens=40)
    while talk.num_output_tokens < 20:
        schedule.step()
    for seed in range(1, 4):
        schedule.add(document(200, seed), max_tokens=1)
        for _ in range(6):
            schedule.step()
    middle = cached_pages(schedule, tokens)
    assert not any(page in middle for page in range(1, 12)), "others took the freed pages"
    schedule.drain()
    turn = [*talk.all_token_ids, 1, 2, 3]
    assert schedule.serve(turn) == (len(turn) - 4) // S * S


@pytest.mark.parametrize(
    "missing, hit",
    [
        ([], 288),
        ([17], 272),  # the newest page: the prefix that ends before it, if its window is there
        ([16], 256),
        ([16, 15], 240),
        ([3], 288),  # a page that nobody needs any more
        ([1, 17], 272),
        ([0], 0),  # the sinks: needed by every prefix
        ([2, 1], 288),
    ],
)
def test_a_missing_page_shortens_the_hit_to_where_it_is_not_seen(missing, hit):
    schedule = streaming(sinks=4, window=32)
    tokens = document(300)
    schedule.serve(tokens)
    pages = cached_pages(schedule, tokens)
    schedule.pool.evict_blocks({pages[page].block_id for page in missing})
    assert schedule.serve(tokens) == hit


@pytest.mark.parametrize(
    "given, missing, hit",
    [
        # Up to 256 tokens everything is seen, so a prefix needs all of its pages; longer ones do
        # without them.
        ({"min_context": 256}, [5], 288),
        ({"min_context": 256}, [5, 17], 272),
        ({"min_context": 256}, [5, 16], 256),
        ({"min_context": 256}, [5, 16, 15], 80),
        ({"min_context": 288}, [5], 288),
        ({"min_context": 289}, [5], 80),
        ({"min_context": 512}, [], 288),
        ({"min_context": 512}, [7], 112),
        # A protected page is needed by every prefix that has it.
        ({"protect": [[90, 91]]}, [4], 288),
        ({"protect": [[90, 91]]}, [5], 80),
        ({"protect": [[90, 97]]}, [6], 96),
        ({"protect": [[90, 97]], "min_context": 64}, [6, 1], 96),
        ({"protect": 100}, [6], 96),
        ({"protect": 100}, [7], 288),
        ({"protect": [[290, 400]]}, [5], 288),  # beyond what is asked for
    ],
)
def test_hits_follow_min_context_and_protected_spans(given, missing, hit):
    schedule = streaming(sinks=4, window=32, **given)
    tokens = document(300)
    schedule.serve(tokens)
    pages = cached_pages(schedule, tokens)
    schedule.pool.evict_blocks({pages[page].block_id for page in missing})
    assert schedule.serve(tokens) == hit


def test_without_sinks_a_hit_needs_the_window_alone():
    schedule = streaming(sinks=0, window=1)
    tokens = document(300)
    schedule.serve(tokens)
    overwrite(schedule, [])
    assert schedule.serve(tokens) == 288, "position 288 sees itself only"


def test_an_identical_prompt_in_flight_is_shared():
    schedule = streaming(sinks=4, window=32)
    first = schedule.add(document(150), max_tokens=4)
    for _ in range(3):
        schedule.step()
    second = schedule.add(document(150), max_tokens=4)
    schedule.step()
    assert schedule.hits[second.request_id] == [144]
    rows = [next(row for _, _, row in schedule.rows(request)) for request in (first, second)]
    shared = [a.block_id for a, b in zip(*rows, strict=True) if a is b and not a.is_null]
    assert len(shared) >= 2
    schedule.finish(first)
    schedule.check()
    schedule.drain()


def test_a_preempted_request_finds_its_own_pages_again():
    schedule = streaming(sinks=4, window=32)
    request = schedule.add(document(200), max_tokens=30)
    for _ in range(10):
        schedule.step()
    done = request.num_computed_tokens
    schedule.preempt(request)
    schedule.drain()
    assert schedule.hits[request.request_id] == [0, (request.num_prompt_tokens + 6) // S * S]
    assert done > 192


def test_a_request_too_long_for_the_free_blocks_waits():
    spec = evicting_spec("streaming_llm(sinks=4, window=32)", 64)
    schedule = Schedule([spec], spec.most_blocks(LONGEST))
    schedule.add(document(400), max_tokens=4)
    schedule.add(document(400, seed=1), max_tokens=4)
    schedule.step()
    schedule.step()
    assert [len(schedule.running), len(schedule.waiting)] == [1, 1]
    schedule.drain()


def test_more_requests_fit_than_with_full_attention():
    """60 blocks, requests of 400 to 500 tokens: 25 blocks each with full attention."""
    spec = evicting_spec("streaming_llm(sinks=4, window=32)", 64)
    together = {}
    for name, group in (("evicting", spec), ("full", FullAttentionSpec(**SHAPE))):
        schedule = Schedule([group], 60)
        for seed in range(20):
            schedule.add(document(400, seed), max_tokens=100)
        together[name] = 0
        while len(schedule.waiting) + len(schedule.running) == 20:
            schedule.step()
            together[name] = max(together[name], len(schedule.running))
    assert together["full"] == 60 // 25
    assert together["evicting"] >= 60 // spec.most_blocks(LONGEST) > 2 * together["full"]


def test_a_pool_of_the_least_size_serves_a_request_of_any_length():
    """vLLM sizes the pool for one request of full length; with it the engine must not stall."""
    for policy in ("streaming_llm(sinks=4, window=32)", "streaming_llm(sinks=40, window=1)"):
        for chunk, ahead in ((16, 1), (50, 2), (64, 1)):
            spec = evicting_spec(policy, chunk * ahead, protect=[[100, 120]])
            schedule = Schedule([spec], spec.most_blocks(LONGEST), chunk, ahead)
            schedule.serve(document(500), max_tokens=12)
            assert schedule.preemptions == 0
