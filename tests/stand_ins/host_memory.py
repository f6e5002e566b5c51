"""Host memory for vLLM's OffloadingConnector on a CPU, whose stock worker wants a GPU.

The scheduler, the connector and its transfers are vLLM's own; only the copy itself is ours, and
moves what the connector refers to: a page's bytes without its padding. It cannot show streams or
pinned memory, nor a copy that is still under way while the next step runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

PADDING = 77
"""What a host page has where nothing was stored."""


class HostWorker(OffloadingWorker):
    def __init__(self, caches: CanonicalKVCaches, pages: int) -> None:
        self.refs = [ref for group in caches.group_data_refs for ref in group]
        self.device = [each.tensor for each in caches.tensors]
        self.host = [
            torch.full((pages, each.page_size_bytes), PADDING, dtype=torch.int8)
            for each in caches.tensors
        ]
        self.moved = {"stored": 0, "loaded": 0}
        """Pages."""
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src: Any, dst: Any) -> bool:
        return self._move("stored", job_id, self.device, src.block_ids, self.host, dst.block_ids)

    def submit_load(self, job_id: int, src: Any, dst: Any) -> bool:
        return self._move("loaded", job_id, self.host, src.block_ids, self.device, dst.block_ids)

    def _move(
        self, what: str, job_id: int, source: list[Any], pages: Any, target: list[Any], to: Any
    ) -> bool:
        assert len(pages) == len(to)
        for ref in self.refs:
            size = ref.page_size_bytes
            page = source[ref.tensor_idx][torch.from_numpy(pages), :size]
            target[ref.tensor_idx][torch.from_numpy(to), :size] = page
        self.moved[what] += len(pages)
        self._done.append(TransferResult(job_id, True, None, None))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: Iterable[int]) -> None:
        """Nothing is under way."""


class HostMemory(CPUOffloadingSpec):
    worker: HostWorker | None = None
    """The last one."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        HostMemory.worker = HostWorker(kv_caches, self.num_chunks)
        return HostMemory.worker
