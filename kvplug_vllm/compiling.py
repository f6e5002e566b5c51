"""Contexts that requests of their own compile, and that all later ones find so.

A request that repeats a chunk reads the context before it as anyone left it there, whole, and its
last step packs what is kept of the chunk into its own blocks, those of the repetition (``kvplug.
schedule``). Once it has ended they are found under the hash of the chunk's end and the policy. Any
other request begins with the chunks that are there, one after the other from its first on; how
many they are goes to the workers with its sampling parameters, each time that it is admitted. What
it computes behind them is hashed under their number too, as it depends on them; what is computed
behind none is hashed as vLLM hashes it, and is whole: for everyone, and to compile from.

All these blocks are the prefix cache's, which lets go of the oldest. A context whose first chunk
is gone is served whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug_vllm import compat
from kvplug_vllm.appending import AppendingSpec
from kvplug_vllm.settings import asked_for, compiled_for, tell_compiled
from kvplug_vllm.streaming import EvictingManager, whole_hashes


@dataclass(frozen=True, kw_only=True)
class CompilingSpec(AppendingSpec):
    """Full attention of whose compiled contexts a share of each chunk is kept."""

    def name_behind(self, block_hash: bytes, chunks: int) -> bytes:
        """Of a block that was computed behind so many compiled chunks. block_hash: vLLM's"""
        line = f"{self.settings.policy} {self.settings.protect} behind {chunks}"
        return hashlib.sha256(block_hash + line.encode()).digest()

    def repeats(self, request: Any) -> bool:
        """Whether a request compiles a chunk."""
        return self.settings.offer().settings_for(asked_for(request.sampling_params)).repeats


class CompilingManager(EvictingManager):
    _looking_up: ClassVar[Any] = None
    """The request whose cached prefix vLLM is about to ask for."""

    def __init__(self, kv_cache_spec: CompilingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.requests: dict[str, Any] = {}
        """Those that are being served."""

    @property
    def repetition(self) -> int:
        """Tokens that a request that compiles brings twice."""
        return self.planner.chunk * self.block_size

    @classmethod
    def look_up(cls, managers: Sequence[Any], request: Any) -> None:
        """A request comes, or comes back after a preemption."""
        cls._looking_up = request
        for manager in managers:
            if isinstance(manager, CompilingManager):
                manager.requests[request.request_id] = request
                tell_compiled(request.sampling_params, 0)

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
        """Compiled chunks and what was computed behind as many; where there are none, or for who
        compiles, what was computed behind none. Who repeats a chunk computes all of that."""
        assert not drop_eagle_block and dcp_world_size == pcp_world_size == 1
        request, spec, size = cls._looking_up, kv_cache_spec, kv_cache_spec.block_size
        assert request is not None, "vLLM looks up a prefix without naming the request"
        assert alignment_tokens == size, "no other groups of layers"
        hashes = whole_hashes(block_hashes, block_pool, size, alignment_tokens)
        planner, repeats = spec.settings.planner(size), spec.repeats(request)
        chunk, kept = planner.chunk, planner.schedule.kept
        if repeats:
            max_length = min(max_length, request.num_prompt_tokens - chunk * size)
        last = max_length // size
        row: list[Sequence[Any]] = []  # a block of each group
        for end in range(chunk, last + 1, chunk) if not repeats else ():
            names = [spec.name(bytes(hashes[end - 1]), number) for number in range(kept)]
            found = [block_pool.get_cached_block(name, kv_cache_group_ids) for name in names]
            if not all(found):
                break
            row += [*found, *[[block_pool.null_block] * len(kv_cache_group_ids)] * (chunk - kept)]
        chunks = len(row) // chunk
        for block_hash in hashes[len(row) : last]:
            name = spec.name_behind(bytes(block_hash), chunks) if chunks else block_hash
            blocks = block_pool.get_cached_block(name, kv_cache_group_ids)
            if not blocks:
                break
            row.append(blocks)
        hit = tuple([blocks[group] for blocks in row] for group in range(len(kv_cache_group_ids)))
        return hit, len(row) * size

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        """What the request begins with is settled: its first steps say so to the workers."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        chunk, row = self.planner.chunk, self.req_to_blocks[request_id]
        lasts = row[chunk - 1 :: chunk]  # a compiled chunk has no last block
        chunks = len(list(takewhile(lambda block: block.is_null, lasts)))
        tell_compiled(self.requests[request_id].sampling_params, chunks)

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        chunks = compiled_for(request.sampling_params)
        if chunks:
            self._name_behind(request, num_tokens, chunks)
            return
        if self.kv_cache_spec.repeats(request):  # the repetition is packed over
            num_tokens = min(num_tokens, request.num_prompt_tokens - self.repetition)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def _name_behind(self, request: Any, num_tokens: int, chunks: int) -> None:
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        row = self.req_to_blocks[request.request_id]
        first, last = self.num_cached_block[request.request_id], num_tokens // self.block_size
        for number in range(first, last):
            name = self.kv_cache_spec.name_behind(bytes(hashes[number]), chunks)
            tokens = (number + 1) * self.block_size
            compat.name_block(self.block_pool, name, self.kv_cache_group_id, row[number], tokens)
        self.num_cached_block[request.request_id] = max(first, last)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        request = self.requests.pop(request_id, None)
        # Its last step is there before a later one can read what it packs.
        ended = request is not None and request.num_computed_tokens >= request.num_prompt_tokens
        if ended and self.kv_cache_spec.repeats(request):
            self._publish(request)
        return super().pop_blocks_for_free(request_id)

    def _publish(self, request: Any) -> None:
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        end = (request.num_prompt_tokens - self.repetition) // self.block_size
        row = self.req_to_blocks[request.request_id]
        for number in range(self.planner.schedule.kept):
            name = self.kv_cache_spec.name(bytes(hashes[end - 1]), number)
            block, tokens = row[end + number], end * self.block_size
            if not self.block_pool.get_cached_block(name, [self.kv_cache_group_id]):
                compat.name_block(self.block_pool, name, self.kv_cache_group_id, block, tokens)


compat.ensure_builtin_specs()
compat.announce_lookups(CompilingManager.look_up)
compat.tell_with_steps()
KVCacheSpecRegistry.register(CompilingSpec, CompilingManager, uniform_type_base_spec=CompilingSpec)
