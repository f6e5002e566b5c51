"""Blocks that return while a request lives: those that no later query will see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug import Sharing
from kvplug_vllm import compat
from kvplug_vllm.metrics import count_returned
from kvplug_vllm.settings import EvictionSettings


def give_back(
    manager: Any, request_id: str, first: int, last: int, policy: str, private: int = 0
) -> None:
    """Free what is left of blocks [first, last) of a request that lives on, and count it.

    policy: the request's. private: blocks that it holds in their place.
    """
    row, spec = manager.req_to_blocks.get(request_id, []), manager.kv_cache_spec
    from_last = range(min(last, len(row)) - 1, first - 1, -1)
    held = sum(1 for _ in takewhile(lambda block: not row[block].is_null, from_last))
    manager._remove_blocks_in_range(request_id, first, last)
    count_returned(policy, held, private, spec.page_size_bytes * spec.layers)


def whole_hashes(
    block_hashes: Any, block_pool: Any, block_size: int, alignment_tokens: int
) -> Sequence[Any]:
    """vLLM's hashes of whole blocks of a manager's own size."""
    return resolve_block_hashes(  # type: ignore[no-any-return]
        block_hashes,
        block_pool.hash_block_size,
        block_size,
        supports_fine_grained_hash_lookup=False,
        alignment_tokens=alignment_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(AttentionSpec):
    """Full attention whose policy evicts by position.

    Not a FullAttentionSpec: vLLM shortens a hit of those by cutting its tail, and a shorter hit
    of ours needs pages that the longer one did without.
    """

    settings: EvictionSettings
    in_flight: int
    """The most tokens that are being computed at once."""
    layers: int = 1
    """That share a block: of one group."""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return replace(super().merge(specs), layers=len(specs))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    @cache  # noqa: B019 -- frozen and hashable
    def most_blocks(self, tokens: int) -> int:
        """That a request of so many tokens holds at once: asked for the length that is served,
        which vLLM may shorten until it fits (``--max-model-len auto``)."""
        return self.settings.planner(self.block_size).most_pages(self.in_flight, tokens)

    @property
    def prefix_cacheable(self) -> bool:
        policy = self.settings.planner(self.block_size).settings.policy
        return policy.publishes is not Sharing.NOBODY


class EvictingManager(SingleTypeKVCacheManager):
    """Frees the pages of live requests that no later query will see, during prefill too.

    A freed page keeps its content and its hash until the pool needs it; a prefix hits as soon as
    the pages that the next query sees are there.
    """

    def __init__(self, kv_cache_spec: EvictingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.planner = kv_cache_spec.settings.planner(self.block_size)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        self.max_admission_blocks_per_request = self.spec.most_blocks(num_tokens)
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        for first, last in self.planner.evictable(processed_computed_tokens):
            give_back(self, request_id, first, last, self.kv_cache_spec.settings.policy)

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
        """drop_eagle_block: EAGLE's layers compute their last block anew, and so do ours."""
        assert dcp_world_size == pcp_world_size == 1
        size = kv_cache_spec.block_size
        max_length = max(max_length - size * drop_eagle_block, 0)
        hashes = whole_hashes(block_hashes, block_pool, size, alignment_tokens)
        planner = kv_cache_spec.settings.planner(size)
        found: dict[int, Any] = {}

        def cached(block: int) -> Any:
            if block not in found:
                found[block] = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
            return found[block]

        blocks = max_length // size
        while blocks:
            if blocks * size % alignment_tokens:
                blocks -= 1
                continue
            needed = planner.needed(blocks * size).tolist()
            missing = [block for block in needed if not cached(block)]
            if not missing:
                break
            blocks = min(missing)  # every longer prefix needs that block too
        hit = tuple([block_pool.null_block] * blocks for _ in kv_cache_group_ids)
        if blocks:
            for block in needed:
                for group, cached_block in zip(hit, cached(block), strict=True):
                    group[block] = cached_block
        return hit, blocks * size


compat.ensure_builtin_specs()
KVCacheSpecRegistry.register(EvictingSpec, EvictingManager, uniform_type_base_spec=EvictingSpec)
