"""Where a policy meets the pool: page sizes for the worker, freed pages for the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug import Offer, Planner, digest_bytes, read_offer
from kvplug_vllm import compat
from kvplug_vllm.metrics import count_returned
from kvplug_vllm.settings import Engine


def customize_spec(spec: Any, layer_class: int = 0) -> Any:
    """The cache spec of one layer under the engine's policy; windowed layers stay stock.

    A selector with a digest grows the page by it; an eviction brings its own manager.
    layer_class: which of the layers' different budgets this one has (``layer_classes``).
    """
    engine = Engine.current
    if engine is None or type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
        return spec
    offer, policy = engine.offer, engine.settings.policy
    if offer.digest is not None:
        digest = digest_bytes(
            offer.digest.rows, spec.num_kv_heads, spec.head_size, spec.dtype.itemsize
        )
        spec = replace(spec, page_size_padded=spec.unpadded_page_size_bytes + digest)
    if policy.eviction is not None:
        planner = Planner(engine.settings, spec.block_size)
        config = engine.vllm_config
        spec = replace_as(
            spec,
            EvictingSpec,
            drop=("sliding_window", "attention_chunk_size", "non_causal"),
            settings=EvictionSettings.of(offer),
            max_blocks=planner.most_pages(
                config.max_in_flight_tokens, config.model_config.max_model_len
            ),
        )
    if policy.scored is not None or offer.mixed:
        from kvplug_vllm.packing import PackingSpec

        budget = layer_classes(engine)[layer_class] if not policy.uniform else None
        tokens = offer.max_tokens if budget is None else budget
        spec = replace_as(
            spec,
            PackingSpec,
            settings=EvictionSettings.of(offer),
            private_blocks=-(-tokens // spec.block_size),
            budget=budget,
        )
    return spec


def layer_classes(engine: Engine) -> list[int]:
    """The different budgets of the planned layers, first to last: a cache group for each."""
    return sorted(set(layer_budgets(engine).values()), reverse=True)


def layer_budgets(engine: Engine) -> dict[str, int]:
    """Tokens that each planned layer keeps of a prompt, by the layer's name."""
    planned = planned_layers(engine.vllm_config)
    budgets = engine.settings.policy.layer_budgets(len(planned))
    return dict(zip(planned, budgets, strict=True))


def planned_layers(vllm_config: Any) -> list[str]:
    """Names of the attention layers that the policy plans, first to last."""
    layers = vllm_config.compilation_config.static_forward_context
    planned = [
        name
        for name, layer in layers.items()
        if getattr(getattr(layer, "impl", None), "planned", False)
    ]
    return sorted(planned, key=compat.layer_index)


def split_layers(engine: Engine) -> None:
    """Give layers of different budgets backends of their own: vLLM asks those for the spec."""
    if engine.settings.policy.uniform:
        return
    context = engine.vllm_config.compilation_config.static_forward_context
    classes = layer_classes(engine)
    for name, budget in layer_budgets(engine).items():
        compat.set_layer_class(context[name], classes.index(budget))


@dataclass(frozen=True, kw_only=True)
class EvictionSettings:
    """An offer as plain values: specs are compared, hashed and sent between processes."""

    policy: str
    min_context: int
    protect: tuple[tuple[int, int], ...]
    shortcut: bool = True
    allow: tuple[str, ...] = ()
    max_budget: int | None = None

    @classmethod
    def of(cls, offer: Offer) -> EvictionSettings:
        own = offer.settings
        return cls(
            policy=str(own.policy),
            min_context=own.min_context,
            protect=own.protect,
            shortcut=own.shortcut,
            allow=offer.allow,
            max_budget=offer.max_budget,
        )

    @cache  # noqa: B019 -- frozen, hashable and as few as the engine's groups
    def offer(self) -> Offer:
        return read_offer(asdict(self), environ={})

    @cache  # noqa: B019 -- as above
    def planner(self, page_size: int) -> Planner:
        return Planner(self.offer().settings, page_size)


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


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(AttentionSpec):
    """Full attention whose policy evicts by position.

    Not a FullAttentionSpec: vLLM shortens a hit of those by cutting its tail, and a shorter hit
    of ours needs pages that the longer one did without.
    """

    settings: EvictionSettings
    max_blocks: int
    """The most blocks a request holds while one step is in flight."""
    layers: int = 1
    """That share a block: of one group."""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return replace(super().merge(specs), layers=len(specs))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.max_blocks * self.page_size_bytes

    @property
    def prefix_cacheable(self) -> bool:
        return self.settings.planner(self.block_size).settings.policy.publishes


class EvictingManager(SingleTypeKVCacheManager):
    """Frees the pages of live requests that no later query will see, during prefill too.

    A freed page keeps its content and its hash until the pool needs it; a prefix hits as soon as
    the pages that the next query sees are there.
    """

    def __init__(self, kv_cache_spec: EvictingSpec, **kwargs: Any) -> None:
        kwargs["max_admission_blocks_per_request"] = kv_cache_spec.max_blocks
        super().__init__(kv_cache_spec, **kwargs)
        self.planner = kv_cache_spec.settings.planner(self.block_size)

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
        assert not drop_eagle_block and dcp_world_size == pcp_world_size == 1
        size = kv_cache_spec.block_size
        hashes: Sequence[Any] = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
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
