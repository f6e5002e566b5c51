"""The stock FlashAttention backend, planned. Not run on a GPU yet (see the README's table).

Decode steps keep their shapes and live in persistent buffers, so that full CUDA graphs replay
them: every row of a decode batch goes through the selection, short ones with all their pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from kvplug_vllm.attention import PlannedBackend, PlannedImpl
from kvplug_vllm.settings import offer_of
from kvplug_vllm.step import PlannedBuilder


class KVPlugImpl(PlannedImpl, FlashAttentionImpl):
    stock = FlashAttentionImpl


class KVPlugBuilder(PlannedBuilder, FlashAttentionMetadataBuilder):
    stock = FlashAttentionMetadataBuilder

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.fixed_shapes = self.use_full_cuda_graph and not self.offer.mixed
        self.buffers: dict[tuple[str, torch.Size], Tensor] = {}
        if self.single is not None:
            # FlashAttention 3 can be scheduled ahead by lengths; those of a selection by mass
            # are known to the device alone, so the kernel schedules itself.
            self.single.aot_schedule = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        offer = offer_of(vllm_config)
        if offer.mixed:  # how many selections a step needs is not known when it is captured
            return AttentionCGSupport.NEVER
        if offer.settings.policy.is_dense:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def _tensor(self, name: str, values: NDArray[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        """Without waiting; where graphs replay, always into the same buffer."""
        host = torch.from_numpy(values).to(dtype).pin_memory()
        if not self.fixed_shapes:
            return host.to(self.device, non_blocking=True)
        return self._buffer(name, host).copy_(host, non_blocking=True)

    def _table(self, common: Any, segments: Any, name: str) -> Tensor:
        table = super()._table(common, segments, name)
        if not self.fixed_shapes or table is common.block_table_tensor:
            return table
        return self._buffer(f"{name}.table", table).copy_(table)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.shape)
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(like, device=self.device)
        return self.buffers[key]

    def _rebuilder(
        self, metadata: Any, build: Callable[[Tensor, Tensor], Any]
    ) -> Callable[[Tensor, Tensor], Any]:
        if self.fixed_shapes:
            metadata.max_num_splits = self.max_num_splits

        def rebuild(table: Tensor, lengths: Tensor) -> Any:
            metadata.block_table, metadata.seq_lens = table, lengths
            return metadata

        return rebuild


class KVPlugBackend(PlannedBackend, FlashAttentionBackend):
    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type[KVPlugImpl]:
        return KVPlugImpl

    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return KVPlugBuilder
