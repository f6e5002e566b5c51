"""The stock CPU backend, planned."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvplug import PromptKV, TokenSelector
from kvplug_kernels.warm_up import warm_up
from kvplug_vllm import compat
from kvplug_vllm.attention import PlannedBackend, PlannedImpl
from kvplug_vllm.compression import Packing
from kvplug_vllm.step import PlannedBuilder


class KVPlugImpl(PlannedImpl, CPUAttentionBackendImpl):
    stock = CPUAttentionBackendImpl

    def keys_and_values(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        if not self.reads_itself(kv_cache.shape[2]):  # any packing will do
            return super().keys_and_values(layer, kv_cache)
        return compat.cpu_keys_and_values(layer.isa, kv_cache)

    def read_pages(self, layer: Any, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        size = kv_cache.shape[2]
        order = compat.cpu_page_order(layer.isa, size, self.head_size, kv_cache.dtype)
        read = kv_cache[pages].flatten(3)  # [J, P, H, 2 * S * D]
        read = read.gather(3, order.expand(read.shape))  # twice as fast as [..., order]
        read = read.unflatten(3, (2, size, self.head_size))
        keys, values = read.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # [2, J, T, H, D]
        return keys, values

    def store_kept(
        self, layer: Any, kv_cache: Tensor, packing: Packing, prompt: PromptKV, tokens: Tensor
    ) -> None:
        """Through the stock kernel, which lays out its pages as it likes."""
        keys, values = (packing.kept(rows, tokens) for rows in (prompt.keys, prompt.values))
        self.do_kv_cache_update(layer, keys, values, kv_cache, packing.slots)


class KVPlugBuilder(PlannedBuilder, CPUAttentionMetadataBuilder):
    stock = CPUAttentionMetadataBuilder

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spec, choosing = self.kv_cache_spec, self.offer.selectors
        tokens = bool(self.layers and self.impl.reads_itself(spec.block_size))
        if tokens:
            compat.cpu_page_strides(self.isa, spec.block_size, spec.head_size, spec.dtype)
        own_process = self.vllm_config.parallel_config.distributed_executor_backend == "mp"
        if own_process and self.layers and self.offer.digest is not None:
            pages = not all(isinstance(each, TokenSelector) for each in choosing)
            warm_up(spec.dtype, pages=pages, tokens=tokens)


class KVPlugBackend(PlannedBackend, CPUAttentionBackend):
    @classmethod
    def supports_sink(cls) -> bool:
        return True  # the stock kernel does, and nobody asks the stock backend

    @staticmethod
    def get_impl_cls() -> type[KVPlugImpl]:
        return KVPlugImpl

    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return KVPlugBuilder
