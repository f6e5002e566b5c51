"""The stock FlashAttention backend, planned. Not run on a GPU yet (see docs/compatibility.md).

Decode steps that a full CUDA graph may replay keep their shapes and live in buffers that never
move: every row of such a batch goes through the selection, short ones with all their pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from kvplug import TokenSelector, block_bytes, keep_tokens, logits_bytes
from kvplug_vllm.attention import PlannedBackend, PlannedImpl, by_head
from kvplug_vllm.coded import CodedBackend, CodedBuilder, CodedImpl, configured_format
from kvplug_vllm.placed import PlacedBuilder, PlacedImpl, places_prompts
from kvplug_vllm.settings import Engine, offer_of
from kvplug_vllm.step import PlannedBuilder


def may_replay(vllm_config: Any) -> bool:
    """Whether graphs may replay whole decode steps: not where how many selections a step needs is
    unknown when it is captured, nor where what a step completes is packed before the next one
    and vLLM, for its recurrent layers, blanks what it gave away in between, nor where what is
    packed lies in an open page, which only a step's own layers know."""
    offer = offer_of(vllm_config)
    scored = offer.settings.policy.scored
    if scored is not None and offer.format is not None:
        return False
    late = scored is not None and scored.appends
    return not offer.mixed and not (late and getattr(vllm_config.model_config, "is_hybrid", False))


def most_replayed(vllm_config: Any) -> int:
    """Requests of the largest decode step that a graph of ours replays; 0 for none."""
    compilation = vllm_config.compilation_config
    if not may_replay(vllm_config) or not offer_of(vllm_config).settings.policy.plans:
        return 0
    if not compilation.cudagraph_mode.has_full_cudagraphs():
        return 0
    if vllm_config.speculative_config is not None:  # decode steps have several queries a request
        return 0
    return compilation.max_cudagraph_capture_size or 0


class KVPlugImpl(PlannedImpl, FlashAttentionImpl):
    stock = FlashAttentionImpl

    def reads_pages(self, tokens: int, block_size: int) -> bool:
        """FlashAttention 3 gathers row by row at any page size, 2 wants multiples of 16."""
        return self.vllm_flash_attn_version == 3 or tokens % 16 == 0

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """With the model's weights, so that the engine's memory profile counts it."""
        super().process_weights_after_loading(act_dtype)
        assert Engine.current is not None
        config, scored = Engine.current.vllm_config, Engine.current.settings.policy.scored
        most = most_replayed(config)
        if self.planned and most and scored is not None and scored.needs_queries:
            device = config.device_config.device
            shape = most, self.num_heads, self.head_size
            self.recent = torch.zeros(shape, dtype=act_dtype, device=device)

    def rehearse(self, layer: Any, key: Tensor) -> None:
        """What packing the longest prompt takes, by each policy that a request may have, and
        what choosing among the tokens of a step's requests does."""
        assert Engine.current is not None
        offer, longest = (
            Engine.current.offer,
            Engine.current.vllm_config.model_config.max_model_len,
        )
        if any(isinstance(each, TokenSelector) for each in offer.selectors):
            most = Engine.current.vllm_config.scheduler_config.max_num_seqs
            room = logits_bytes(most, self.num_heads, longest)
            key.new_empty(room, dtype=torch.uint8)
        for selector in offer.block_selectors:
            size = Engine.current.vllm_config.cache_config.block_size
            room = block_bytes(
                selector, len(key), self.num_kv_heads, self.num_queries_per_kv, self.head_size,
                longest, size,
            )  # fmt: skip
            key.new_empty(room, dtype=torch.uint8)
        if offer.format is not None:
            self.rehearse_codes(layer, key, longest)
        for scored in offer.scorers:
            if scored.compiles:
                longest = min(longest, scored.every or longest)
            shape = 1, longest, self.num_kv_heads, 2 * self.head_size
            kv = key.new_zeros(shape, dtype=self.numbers)
            keys, values = kv.split(self.head_size, dim=-1)
            window = None
            if scored.needs_queries:
                asking = longest if scored.compiles else scored.window
                window = key.new_zeros(1, asking, self.num_heads, self.head_size)
            lengths = torch.full((1,), longest, device=key.device)
            repeated = keys if scored.compiles else None
            prompt = self.prompt(
                layer, keys, values, window, lengths, page_size=1, repeated=repeated
            )
            one = self.num_kv_heads if by_head(offer) else 1  # may keep what others leave
            width = min(offer.max_tokens * one, longest)
            tokens = keep_tokens(scored, prompt, lengths.clamp(max=width), width)
            if self.numbers is None:
                index = tokens.transpose(1, 2)[..., None].expand(-1, -1, -1, self.head_size)
                keys.gather(1, index)  # to their digests


class Lasting:
    """Buffers at addresses that graphs capture: one for each purpose that a step has."""

    def __init__(self, most: int, device: torch.device) -> None:
        """most: requests of a step."""
        self.most = most
        self.device = device
        self.buffers: dict[str, Tensor] = {}
        self.taken: set[str] = set()

    def begin(self) -> None:
        """A step: each purpose has one content again."""
        self.taken.clear()

    def put(self, name: str, values: Tensor, rows: int, columns: int | None) -> Tensor:
        """values, as the first of a buffer of so many rows (and columns)."""
        assert name not in self.taken, f"{name} is wanted twice in a step that a graph replays"
        self.taken.add(name)
        if name not in self.buffers:
            shape = (rows,) if columns is None else (rows, columns)
            self.buffers[name] = torch.zeros(shape, dtype=torch.int32, device=self.device)
        buffer = self.buffers[name][: len(values)]
        held = buffer if columns is None else buffer[:, : values.shape[1]]
        held.copy_(values, non_blocking=True)
        return buffer


class KVPlugBuilder(PlannedBuilder, FlashAttentionMetadataBuilder):
    stock = FlashAttentionMetadataBuilder

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.most_replayed = most_replayed(vllm_config)
        self.lasting = Lasting(self.most_replayed, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        if not may_replay(vllm_config):
            return AttentionCGSupport.NEVER
        if not offer_of(vllm_config).settings.policy.plans:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def plan_step(self, common: Any, metadata: Any) -> Any:
        self.lasting.begin()
        return super().plan_step(common, metadata)

    def _tensor(self, values: NDArray[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        """Without waiting."""
        host = torch.from_numpy(values).to(dtype).pin_memory()
        return host.to(self.device, non_blocking=True)

    def _lasting(
        self, name: str, values: NDArray[Any] | Tensor, each: int = 1, more: int = 0,
        columns: int | None = None,
    ) -> Tensor:  # fmt: skip
        if not self.fixed:
            return super()._lasting(name, values, each, more, columns)
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(values).to(torch.int32).pin_memory()
        return self.lasting.put(name, values, self.lasting.most * each + more, columns)

    def _of_heads(self, sequences: Any) -> Any:
        metadata = super()._of_heads(sequences)
        if self.fixed:
            metadata.max_num_splits = self.max_num_splits
        return metadata

    def _rebuilder(
        self, metadata: Any, build: Callable[[Tensor, Tensor], Any]
    ) -> Callable[[Tensor, Tensor], Any]:
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
        if places_prompts():
            return PlacedCUDAImpl
        return KVPlugImpl if configured_format() is None else CodedCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return KVPlugBuilder


class CodedCUDAImpl(CodedImpl, KVPlugImpl):
    pass


class CodedCUDABuilder(CodedBuilder, KVPlugBuilder):
    pass


class CodedCUDABackend(CodedBackend, KVPlugBackend):
    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return CodedCUDABuilder


KVPlugBackend.coded = CodedCUDABackend


class PlacedCUDAImpl(PlacedImpl, KVPlugImpl):
    pass


class PlacedCUDABuilder(PlacedBuilder, KVPlugBuilder):
    pass


class PlacedCUDABackend(KVPlugBackend):
    @staticmethod
    def get_builder_cls() -> type[KVPlugBuilder]:
        return PlacedCUDABuilder


KVPlugBackend.placed = PlacedCUDABackend
