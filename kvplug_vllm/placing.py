"""Prompts that go to host memory: which places there are a request's, decided where blocks are.

The pages that say what lies on the host, a *directory* (``kvplug.placement``), are blocks that the
manager takes from the pool before anything else, the first ones, and for good: the number of a
digest among them is the place on the host of the page that it speaks of. So the blocks of a
request's row tell its worker where its pages lie, and who has blocks of the directory has that
much of the host. They are none of the pool's any more: it counts, frees and hashes the others.

A request that is admitted takes what its prompt will need of the directory, and waits while there
is too little; it gives it back when it ends, or is preempted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug import Planner
from kvplug_vllm import compat
from kvplug_vllm.packing import Held, PackingManager, PackingSpec


@dataclass(frozen=True, kw_only=True)
class PlacingSpec(PackingSpec):
    """Full attention whose prompts go to the host; ``private_blocks`` of a request are hot."""

    directory: int
    """Blocks of it, for all requests."""

    def listed(self, tokens: int) -> int:
        """Blocks of the directory that a prompt of so many tokens takes, if any."""
        planner = Planner(self.settings.offer().settings, self.block_size)
        private = planner.schedule.course(tokens).private
        return private - self.private_blocks if private else 0

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len) + self.listed(max_len)

    def most_blocks(self, tokens: int) -> int:  # type: ignore[override]  # cached there
        """Of the pool's own."""
        return super().most_blocks(tokens) - self.listed(tokens - 1)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        blocks = self.most_blocks(vllm_config.model_config.max_model_len) + self.directory
        return blocks * self.page_size_bytes


class PlacingManager(PackingManager):
    """Rows are [prompt blocks | hot blocks | directory blocks | decode blocks]."""

    def __init__(self, kv_cache_spec: PlacingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.directory = compat.take_first_blocks(self.block_pool, kv_cache_spec.directory)
        """Blocks that no request has."""
        self.taken: dict[str, list[Any]] = {}

    def _listed(self, held: Held) -> int:
        private = held.course.private
        return private - self.spec.private_blocks if private else 0

    def _at_most(self, held: Held, num_tokens: int) -> int:
        listed = self._listed(held) * (num_tokens >= held.course.begin)
        return super()._at_most(held, num_tokens) - listed * self.block_size

    def _behind(self, request_id: str) -> int:
        """The column of a row where its directory begins."""
        return self.held[request_id].course.column + self.spec.private_blocks

    def _to_list(self, request_id: str, num_tokens: int) -> bool:
        """Whether so many tokens bring its directory into its row."""
        inserted = len(self.req_to_blocks.get(request_id, ())) > self._behind(request_id)
        return num_tokens > self.held[request_id].course.begin and not inserted

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        listed = self._listed(self.held[request_id])
        if request_id not in self.taken and listed > len(self.directory):
            return int(self.block_pool.num_gpu_blocks) + 1  # more than there are: it waits
        needed = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        own = not apply_admission_cap and self._to_list(request_id, num_tokens)
        return needed - listed * own

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        listed, new = self._listed(self.held[request_id]), []
        if request_id not in self.taken:
            kept = len(self.directory) - listed
            self.directory, self.taken[request_id] = self.directory[:kept], self.directory[kept:]
        if self._to_list(request_id, num_tokens):
            tokens = self._behind(request_id) * self.block_size
            new = super(PackingManager, self).allocate_new_blocks(
                request_id, tokens, num_tokens_main_model
            )
            for block in self.taken[request_id]:
                block.ref_cnt = 1
            new += self.taken[request_id]
            self.req_to_blocks[request_id].extend(self.taken[request_id])
        return new + super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        for block in (back := self.taken.pop(request_id, [])):
            block.ref_cnt = 0
        self.directory += back
        blocks = super().pop_blocks_for_free(request_id)
        return [block for block in blocks if block.is_null or block.block_id > self.spec.directory]


compat.ensure_builtin_specs()
KVCacheSpecRegistry.register(PlacingSpec, PlacingManager, uniform_type_base_spec=PlacingSpec)
