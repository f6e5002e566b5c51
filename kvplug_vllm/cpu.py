"""The stock CPU backend, planned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvplug import PageFormat, PromptKV, TokenSelector
from kvplug.head_pages import HeadPacking
from kvplug_kernels.fp8 import widened
from kvplug_kernels.warm_up import warm_up
from kvplug_vllm import compat, eight_bits
from kvplug_vllm.attention import PlannedBackend, PlannedImpl
from kvplug_vllm.coded import CodedBackend, CodedBuilder, CodedImpl, configured_format
from kvplug_vllm.compression import Packing
from kvplug_vllm.step import PlannedBuilder


class KVPlugImpl(PlannedImpl, CPUAttentionBackendImpl):
    stock = CPUAttentionBackendImpl

    def keys_and_values(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        if not self.reads_itself(kv_cache.shape[2]):  # any packing will do
            return super().keys_and_values(layer, kv_cache)
        return compat.cpu_keys_and_values(layer.isa, kv_cache)

    def order(self, layer: Any, kv_cache: Tensor) -> Tensor:
        dtype = self.numbers or kv_cache.dtype
        return compat.cpu_page_order(layer.isa, kv_cache.shape[2], self.head_size, dtype)

    def written(self, layer: Any, kv_cache: Tensor, slots: Tensor) -> Tensor:
        at, size = slots.clamp(min=0), kv_cache.shape[2]
        places = self.order(layer, kv_cache)[: size * self.head_size].view(size, -1)
        heads = torch.arange(self.num_kv_heads)[:, None]
        return kv_cache.flatten(2)[(at // size)[:, None, None], heads, places[at % size][:, None]]

    def read_pages(self, layer: Any, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        size, order = kv_cache.shape[2], self.order(layer, kv_cache)
        read = kv_cache[pages].flatten(3)  # [J, P, H, 2 * S * D]
        read = read.gather(3, order.expand(read.shape))  # twice as fast as [..., order]
        read = read.unflatten(3, (2, size, self.head_size))
        read = read.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # [2, J, T, H, D]
        keys, values = self.as_numbers(read)
        return keys, values

    def keys_of(self, layer: Any, kv_cache: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor]:
        """Out of the kernel's own order, each page once."""
        pages, table = page_table.unique(return_inverse=True)
        size, half = kv_cache.shape[2], kv_cache.shape[2] * self.head_size
        order = self.order(layer, kv_cache)[:half]
        read = kv_cache[pages].flatten(2)  # [U, H, 2 * S * D]
        read = read.gather(2, order.expand(*read.shape[:2], half))
        keys = self.as_numbers(read.view(*read.shape[:2], size, self.head_size))
        return keys.transpose(1, 2), table.to(torch.int32)

    def store_kept(
        self, layer: Any, kv_cache: Tensor, packing: Packing, prompt: PromptKV, tokens: Tensor
    ) -> None:
        """Through the stock kernel, which lays out its pages as it likes. Numbers of eight bits
        stay what they are: it takes them for keys and values that are to be divided by one."""
        rows = (widened(each) for each in (prompt.keys, prompt.values))
        keys, values = (packing.kept(each, tokens) for each in rows)
        if self.numbers is not None:
            layer = SimpleNamespace(
                layer_name=layer.layer_name, isa=layer.isa, _k_scale_float=1.0, _v_scale_float=1.0
            )
        self.do_kv_cache_update(layer, keys, values, kv_cache, packing.slots)

    def store_heads(
        self, layer: Any, kv_cache: Tensor, packing: HeadPacking, prompt: PromptKV, tokens: Tensor
    ) -> None:
        """Through the stock kernel, over the cache of one KV head that they are read from."""
        keys, values = (
            packing.kept(each, tokens)[:, None] for each in (prompt.keys, prompt.values)
        )
        size, virtual = kv_cache.shape[2], self.views(layer, kv_cache).virtual[kv_cache.shape[2]]
        page = packing.page * virtual.page_stride + packing.place * virtual.head_stride
        slots = page * size + packing.offset
        self.stock.do_kv_cache_update(self.single, layer, keys, values, virtual.cache, slots)


class KVPlugBuilder(PlannedBuilder, CPUAttentionMetadataBuilder):
    stock = CPUAttentionMetadataBuilder

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spec, choosing = self.kv_cache_spec, self.offer.selectors
        tokens = bool(self.layers and self.impl.reads_itself(spec.block_size))
        cached = eight_bits.numbers(self.kv_cache_dtype) or spec.dtype
        if tokens:
            compat.cpu_page_strides(self.isa, spec.block_size, spec.head_size, cached)
        own_process = self.vllm_config.parallel_config.distributed_executor_backend == "mp"
        if own_process and self.layers:
            if self.offer.format is not None:
                self._warm_up_codes(self.offer.format)
            elif self.offer.digest is not None:
                pages = not all(isinstance(each, TokenSelector) for each in choosing)
                pages |= any(each.digest is not None for each in self.offer.block_selectors)
                warm_up(self.dtype, cached, pages=pages, tokens=tokens)

    def _warm_up_codes(self, format: PageFormat) -> None:
        spec, choosing = self.kv_cache_spec, self.offer.selectors
        tokens = [isinstance(each, TokenSelector) for each in choosing]
        layout = format.layout(spec.block_size, spec.head_size, self.dtype)
        warm_up(self.dtype, pages=not all(tokens), tokens=any(tokens), layout=layout)


class KVPlugBackend(PlannedBackend, CPUAttentionBackend):
    @classmethod
    def supports_sink(cls) -> bool:
        return True  # the stock kernel does, and nobody asks the stock backend

    @staticmethod
    def get_impl_cls() -> type[KVPlugImpl]:
        return KVPlugImpl if configured_format() is None else CodedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return KVPlugBuilder


class CodedCPUImpl(CodedImpl, KVPlugImpl):
    pass


class CodedCPUBuilder(CodedBuilder, KVPlugBuilder):
    pass


class CodedCPUBackend(CodedBackend, KVPlugBackend):
    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return CodedCPUBuilder


KVPlugBackend.coded = CodedCPUBackend
