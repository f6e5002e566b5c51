"""The page that a request is filling, where pages are kept in a format: plain, until it is coded.

Each coded layer has a layer beside it in a cache group of its own, from which a request holds as
many blocks as one plain page takes, for as long as it lives. They come from the same pool, so that
vLLM's own numbers count them, and are never hashed: nobody else ever reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug_kernels.page_layout import PageLayout
from kvplug_vllm import compat
from kvplug_vllm.settings import NAME, Engine


@dataclass(frozen=True, kw_only=True)
class OpenSpec(CircularBufferSpec):
    """So many blocks of a request, from its first step to its last."""

    blocks: int

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Model Runner V1 numbers slots for every group, by a request's positions."""
        return max(self.blocks, -(-max_len // self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(
            isinstance(spec, OpenSpec) and spec.blocks == self.blocks
            for spec in kv_cache_specs.values()
        )


class OpenManager(CircularBufferManager):
    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.blocks

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        row = self.req_to_blocks[request_id]
        if row:
            return []
        row.extend(self.block_pool.get_new_blocks(self.kv_cache_spec.blocks))
        return list(row)


@dataclass
class OpenMetadata:
    table: Tensor
    """Blocks of each row of the batch. [B, at least ``OpenSpec.blocks``] int32"""


class OpenBuilder(AttentionMetadataBuilder[OpenMetadata]):
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> OpenMetadata:
        return OpenMetadata(common_attn_metadata.block_table_tensor)


def kv_cache_layouts() -> tuple[KVCacheLayout, ...]:
    """Where layers are of different formats a block has their pages side by side, so that none is
    padded to the widest."""
    engine = Engine.current
    assert engine is not None
    assert engine.offer.format is not None
    return (KVCacheLayout.BLHNC if engine.offer.format.apart else KVCacheLayout.LBHNC,)


class OpenBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("an open page is read by the layer that codes it")

    @staticmethod
    def get_builder_cls() -> type[OpenBuilder]:
        return OpenBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return kv_cache_layouts()


class OpenLayer(torch.nn.Module, AttentionLayerBase):
    """Of one attention layer."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.heads, self.head_size, self.dtype = (
            of.num_kv_heads, of.head_size, of.kv_cache_torch_dtype,
        )  # fmt: skip
        self.of = of.layer_name
        self.layer_name = f"{self.of}.open"
        self.kv_cache = torch.tensor([])
        self._viewed: tuple[Any, Tensor] | None = None

    @cached_property
    def layouts(self) -> list[PageLayout]:
        """Of each layer's pages of codes: vLLM may set the block's size late."""
        engine = Engine.current
        assert engine is not None
        assert engine.offer.format is not None
        config = engine.vllm_config
        layers = config.model_config.hf_text_config.num_hidden_layers
        size = config.cache_config.block_size
        return engine.offer.format.layouts(layers, size, self.head_size, self.dtype)

    @cached_property
    def layout(self) -> PageLayout:
        """Of the pages that its own become."""
        return self.layouts[compat.layer_index(self.of)]

    @cached_property
    def narrowest(self) -> PageLayout:
        """Whose pages are as large as the blocks of every open page: all are of one group."""
        return min(self.layouts, key=lambda layout: layout.token_bytes)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return OpenBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> OpenSpec:
        layers = self.layouts
        # vLLM splits layers of one page size where as many each of others' are: the last is larger
        odd = len(set(layers)) > 1 and compat.layer_index(self.of) == len(layers) - 1
        return OpenSpec(
            block_size=self.layout.page_size,
            num_kv_heads=self.heads,
            head_size=self.head_size,
            dtype=torch.uint8,
            state_content_bytes=self.narrowest.token_bytes + odd,
            blocks=self.narrowest.plain_pages,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self._viewed = None

    def numbers(self) -> Tensor:
        """Plain tokens in its cache's blocks, keys before values. [N, n, 2, H, D]"""
        cache = self.kv_cache
        if self._viewed is None or self._viewed[0] is not cache:
            tokens, dtype = self.narrowest.plain_tokens, self.dtype
            each = 2 * self.heads * self.head_size
            stride = cache.stride(0)
            assert cache[0].is_contiguous(), f"blocks in pieces: {cache.stride()}"
            used = cache.as_strided((len(cache), tokens * each * dtype.itemsize), (stride, 1))
            shape = (tokens, 2, self.heads, self.head_size)
            self._viewed = cache, used.view(dtype).unflatten(1, shape)
        return self._viewed[1]


def open_layer(layer_name: str, vllm_config: Any) -> OpenLayer:
    context = vllm_config.compilation_config.static_forward_context
    found: OpenLayer = context[f"{layer_name}.open"]
    return found


def add_open_layers(names: Sequence[str], vllm_config: Any) -> None:
    """One beside each of the attention layers, for vLLM to ask for its specification."""
    context = vllm_config.compilation_config.static_forward_context
    for name in names:
        if f"{name}.open" not in context:
            beside = OpenLayer(context[name])
            context[beside.layer_name] = beside


compat.ensure_builtin_specs()
KVCacheSpecRegistry.register(OpenSpec, OpenManager, uniform_type_base_spec=OpenSpec)
