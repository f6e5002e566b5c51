"""Chunks of a context that are packed where they lie, and found so by whoever comes with them.

The worker packs what is kept of a chunk into its first blocks in the step that computes its last
token (``kvplug.schedule``); when that step is committed, the others return to the pool. What was
packed is a function of all tokens up to the chunk's end and of the policy, and is hashed under
both: the next turn, and everyone else with that prefix, goes on from it. Blocks that are yet to be
packed have no hash: they will be written over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug_vllm import compat
from kvplug_vllm.streaming import EvictingManager, EvictingSpec, give_back, whole_hashes


@dataclass(frozen=True, kw_only=True)
class AppendingSpec(EvictingSpec):
    """Full attention of which a share of each chunk is kept."""

    def name(self, chunk_end: bytes, block: int) -> bytes:
        """Of a packed block of a chunk in the prefix cache. chunk_end: vLLM's hash of the tokens
        up to there"""
        line = f"{self.settings.policy} {self.settings.protect} {block}"
        return hashlib.sha256(chunk_end + line.encode()).digest()


class AppendingManager(EvictingManager):
    def __init__(self, kv_cache_spec: AppendingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.requests: dict[str, Any] = {}
        """Those that are being served and may be found by others."""
        self.packed: dict[str, int] = {}
        """Chunks of each that were packed, and their other blocks given back."""

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        self.requests[request.request_id] = request

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        chunk, kept = self.planner.chunk, self.planner.schedule.kept
        before = self.packed.get(request_id, 0)
        last = processed_computed_tokens // self.block_size // chunk
        for number in range(before, last):
            self._publish(request_id, number)
            first = number * chunk
            give_back(
                self, request_id, first + kept, first + chunk, self.kv_cache_spec.settings.policy
            )
        if last > before:
            self.packed[request_id] = last

    def _publish(self, request_id: str, chunk: int) -> None:
        request = self.requests.get(request_id)
        if request is None or not self.enable_caching:
            return
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        first, end = chunk * self.planner.chunk, (chunk + 1) * self.planner.chunk
        if end > len(hashes):
            return  # a step ahead of what was said
        blocks = self.req_to_blocks[request_id][first : first + self.planner.schedule.kept]
        for number, block in enumerate(blocks):
            if block.block_hash is None and not block.is_null:  # else it was found packed
                name = self.kv_cache_spec.name(bytes(hashes[end - 1]), number)
                compat.name_block(
                    self.block_pool, name, self.kv_cache_group_id, block, end * self.block_size
                )

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """What its last steps pack is there before a later one can read it."""
        before = self.packed.pop(request_id, 0)
        if (request := self.requests.get(request_id)) is not None:
            last = request.num_computed_tokens // self.block_size // self.planner.chunk
            for number in range(before, last):
                self._publish(request_id, number)
        self.requests.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Whole chunks, all of whose packed blocks are there."""
        assert not drop_eagle_block and dcp_world_size == pcp_world_size == 1
        size = kv_cache_spec.block_size
        planner = kv_cache_spec.settings.planner(size)
        hashes = whole_hashes(block_hashes, block_pool, size, alignment_tokens)
        chunk, kept = planner.chunk, planner.schedule.kept
        hit: tuple[list[Any], ...] = tuple([] for _ in kv_cache_group_ids)
        for end in range(chunk, max_length // size + 1, chunk):
            names = [kv_cache_spec.name(bytes(hashes[end - 1]), n) for n in range(kept)]
            found = [block_pool.get_cached_block(name, kv_cache_group_ids) for name in names]
            if not all(found):
                break
            for group, blocks in zip(hit, zip(*found, strict=True), strict=True):
                group += [*blocks, *[block_pool.null_block] * (chunk - kept)]
        while hit[0] and len(hit[0]) * size % alignment_tokens:
            for group in hit:
                del group[-chunk:]
        return hit, len(hit[0]) * size


compat.ensure_builtin_specs()
KVCacheSpecRegistry.register(AppendingSpec, AppendingManager, uniform_type_base_spec=AppendingSpec)
