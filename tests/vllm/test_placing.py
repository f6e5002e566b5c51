"""Prompts on the host in vLLM's own block pool: ``test_packing``'s schedules, with a directory.

No engine starts. What is the directory's is never the pool's, and one request's at a time.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug import read_offer
from kvplug_vllm.placing import PlacingManager, PlacingSpec
from kvplug_vllm.settings import EvictionSettings
from tests.vllm.test_manager import SHAPE, S, document, event, play
from tests.vllm.test_packing import Packed, events_of, least_blocks


def placing_spec(pages=3, directory=2, **given) -> PlacingSpec:
    room = directory * (S + 1) * S
    line = f"host(pages={pages}, room={room}) + quest(budget=48, dense_layers=0)"
    return PlacingSpec(
        settings=EvictionSettings.of(read_offer({"policy": line, **given}, environ={})),
        private_blocks=pages,
        directory=directory,
        **SHAPE,
    )


class Placed(Packed):
    """``blocks`` are the pool's, and those of the directory that are in rows."""

    @property
    def blocks(self) -> int:
        in_rows = sum(bool(block.ref_cnt) for block in self.pool.blocks[1 : self.first])
        return self.total - (self.first - 1) + in_rows

    @blocks.setter
    def blocks(self, count) -> None:
        self.total, self.first = count, 1 + self.placing.directory

    @property
    def placing(self) -> PlacingSpec:
        return self.manager.coordinator.single_type_managers[0].spec

    def check(self):
        super().check()
        (manager,) = self.manager.coordinator.single_type_managers
        owned = [*manager.directory, *(each for of in manager.taken.values() for each in of)]
        assert sorted(block.block_id for block in owned) == list(range(1, self.first))
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        assert not free & set(range(1, self.first))
        assert self.pool.num_gpu_blocks == self.total + 1 - (self.first - 1)
        for request in self.running:
            for _, spec, row in self.rows(request):
                events = events_of(spec, request)
                listed = [block for block in row if 0 < block.block_id < self.first]
                assert {*map(id, listed)} <= {*map(id, manager.taken[request.request_id])}
                if events and request.num_computed_tokens > events[0][0]:
                    behind = -(-events[0][0] // S) + spec.private_blocks
                    assert row[behind : behind + len(listed)] == listed
                    assert len(listed) == events[0][2] - spec.private_blocks
                else:
                    assert not listed

    def drain(self, steps=2000):
        super().drain(steps)
        for manager in self.manager.coordinator.single_type_managers:
            assert not manager.taken
        assert self.pool.get_usage() == 0


def test_vllm_builds_our_manager_for_our_spec():
    spec = placing_spec(directory=5)
    (manager,) = Placed([spec], 80).manager.coordinator.single_type_managers
    assert isinstance(manager, PlacingManager)
    # A prompt of 31 whole pages, three hot ones, the first of its answer, and the directory.
    assert least_blocks(spec, 512) == 31 + 1 + 3 + 5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 6),
    st.integers(2, 5),
    st.sampled_from([0, 0, 128]),
    st.lists(event, min_size=1, max_size=20),
    st.integers(0, 60),
    st.sampled_from([16, 40, 64, 300]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
)
def test_no_schedule_leaks_a_block_or_lists_one_twice(
    pages, directory, min_context, events, spare, chunk, ahead, must_fit, caching
):
    spec = placing_spec(pages, directory, min_context=min_context)
    blocks = least_blocks(spec, 320) + spare
    schedule = Placed(
        [spec], blocks, chunk, ahead, max_model_len=320, must_fit=must_fit, caching=caching
    )
    play(schedule, events)


def test_who_finds_no_room_waits_and_takes_it_from_who_ends():
    schedule = Placed([placing_spec(directory=2)], 200, chunk=300, max_model_len=512)
    first, second, third = (
        schedule.add(document(20 * S - 1), max_tokens=tokens) for tokens in (10, 20, 10)
    )
    short = schedule.add(document(40), max_tokens=4)
    while first in schedule.waiting or first in schedule.running:
        schedule.step()
        assert second not in schedule.running, "of two blocks a prompt of 19 pages takes both"
        assert short in schedule.waiting, "who comes later waits behind"
    while third in schedule.waiting:
        schedule.step()
    assert second not in schedule.running
    schedule.preempt(third)
    (manager,) = schedule.manager.coordinator.single_type_managers
    assert third.request_id not in manager.taken
    assert len(manager.directory) == 2
    schedule.drain()
