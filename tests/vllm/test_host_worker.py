"""Where pages of several groups and chunks lie on the host, and jobs that a device is still at."""

from __future__ import annotations

import pytest
import torch

from kvplug_vllm import host

BLOCKS, WIDTHS = 40, (8, 12)


class Counted(host.Pages):
    """Pages of two groups, each of whose bytes says which block it is of."""

    device = torch.device("cpu")
    at_once = 3

    def __init__(self) -> None:
        self.pool = [torch.zeros(BLOCKS, width, dtype=torch.uint8) for width in WIDTHS]
        self.most = 0

    def width(self, group: int) -> int:
        return WIDTHS[group]

    def read(self, group: int, blocks: torch.Tensor) -> torch.Tensor:
        self.most = max(self.most, len(blocks))
        return self.pool[group][blocks]

    def write(self, group: int, blocks: torch.Tensor, rows: torch.Tensor) -> None:
        self.pool[group][blocks] = rows


def pool(blocks, sizes, first):
    from vllm.v1.kv_offload.base import GPULoadStoreSpec

    return GPULoadStoreSpec(blocks, group_sizes=sizes, block_indices=first)


def chunks(*ids):
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

    return CPULoadStoreSpec(list(ids))


def test_blocks_of_groups_come_back_out_of_the_middle_of_chunks():
    pages = Counted()
    worker = host.HostWorker(pages, 5 * 4, max(WIDTHS), blocks_per_chunk=4)
    for group in range(2):
        for block in range(BLOCKS):
            pages.pool[group][block] = 100 * group + block
    before = [held.clone() for held in pages.pool]
    # Eight blocks of the first group in chunks 3 and 0, four of the second in chunk 2.
    stored = [*range(10, 18), *range(20, 24)]
    assert worker.submit_store(1, pool(stored, (8, 4), (0, 0)), chunks(3, 0, 2))
    assert pages.most == pages.at_once
    # From the third of its eight on, six of the first group, and none of the second.
    target = [30, 31, 32, 33, 34, 35]
    assert worker.submit_load(2, chunks(3, 0), pool(target, (6, 0), (2, 0)))
    assert torch.equal(pages.pool[0][target], before[0][12:18])
    assert worker.submit_load(3, chunks(2), pool([5, 6, 7, 8], (0, 4), (0, 4)))
    assert torch.equal(pages.pool[1][5:9], before[1][20:24])
    done = worker.get_finished()
    assert [(each.job_id, each.success, each.transfer_size) for each in done] == [
        (1, True, 8 * WIDTHS[0] + 4 * WIDTHS[1]),
        (2, True, 6 * WIDTHS[0]),
        (3, True, 4 * WIDTHS[1]),
    ]
    assert all(each.transfer_time >= 0 for each in done)
    assert worker.get_finished() == []


def test_more_blocks_on_the_host_than_were_named_are_a_fault():
    worker = host.HostWorker(Counted(), 4, max(WIDTHS), blocks_per_chunk=1)
    with pytest.raises(AssertionError):
        worker.submit_store(1, pool([1, 2], (2, 0), (0, 0)), chunks(0, 1, 2))


class Event:
    """A device's, over once somebody waited for it or it is told so."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True

    def elapsed_time(self, later: Event) -> float:
        return 2.0  # milliseconds


def test_a_job_is_done_when_the_device_is_and_in_order(monkeypatch):
    events: list[Event] = []

    def moment(device):
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(host, "moment", moment)
    worker = host.HostWorker(Counted(), 4, max(WIDTHS), blocks_per_chunk=1)
    for job in (1, 2, 3):
        worker.submit_store(job, pool([job], (1, 0), (0, 0)), chunks(job))
    first, second, third = events[1::2]
    assert worker.get_finished() == []
    second.over = True
    assert worker.get_finished() == [], "transfers are over in their order"
    worker.wait({1})
    done = worker.get_finished()
    assert [each.job_id for each in done] == [1, 2]
    assert [each.transfer_time for each in done] == [0.002, 0.002]
    worker.shutdown()
    assert (first.over, third.over) == (True, True)


def specification(size, **extra):
    """Of three layers in one group and two in another, 2 KV heads of 64 channels in 16 bits."""
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )  # fmt: skip

    names = (("a", "b", "c"), ("d", "e"))
    return host.HostPages(
        OffloadingConfig(
            groups=tuple(
                OffloadingGroupConfig(tokens_per_block=32, layer_names=each, group_id=number)
                for number, each in enumerate(names)
            ),
            worker_kv_bytes_per_block=3 * 2 * 2 * 32 * 64 * 2,
            enable_kv_cache_events=False,
            extra_config={"cpu_bytes_to_use": size, "kvplug_heads": [2, 64], **extra},
            engine_id="",
            model=OffloadingModelConfig(name="", dtype="bfloat16"),
            cache=OffloadingCacheConfig(tokens_per_hash=32, blocks_per_chunk=2),
            parallel=OffloadingParallelConfig(
                rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1,
                data_parallel_index=0, data_parallel_size=1, data_parallel_rank_local=None,
                is_parallelism_agnostic=False,
            ),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "extra, row",
    [
        ({}, 3 * 2 * 4480),
        ({"format": "kivi(bits=4)"}, 3 * 2 * 2432),
        ({"format": "plain"}, 3 * 2 * 8192),
    ],
)
def test_the_host_is_as_large_as_it_was_said_to_be(extra, row):
    made = specification(10 * row + 1, **extra)
    assert (made.row_bytes, made.num_chunks) == (row, 5)
    wanted = rf"must hold a chunk of all layers' pages, {2 * row:,} bytes, got {2 * row - 1:,}"
    with pytest.raises(ValueError, match=wanted):
        specification(2 * row - 1, **extra)
