"""The stock CPU backend, planned."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvplug_vllm.attention import PlannedBackend, PlannedImpl
from kvplug_vllm.step import PlannedBuilder


class KVPlugImpl(PlannedImpl, CPUAttentionBackendImpl):
    stock = CPUAttentionBackendImpl


class KVPlugBuilder(PlannedBuilder, CPUAttentionMetadataBuilder):
    stock = CPUAttentionMetadataBuilder


class KVPlugBackend(PlannedBackend, CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[KVPlugImpl]:
        return KVPlugImpl

    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return KVPlugBuilder
