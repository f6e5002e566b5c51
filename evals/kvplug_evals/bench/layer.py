"""One attention layer as vLLM builds it: its own configuration, cache, metadata builder and code.

No engine starts and no weights load. What an engine would do around the layer (name the model's
shape, number the blocks, write the prompt) is done here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheGroupSpec
from vllm.v1.worker.utils import allocate_kv_cache

if find_spec("vllm.v1.core.kv_cache_planning"):  # from 0.33 on
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
else:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

LAYER = "model.layers.2.self_attn.attn"  # quest's first two layers read everything
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """B requests of T cached tokens each, the new one included."""

    B: int
    T: int
    Hq: int
    H: int
    D: int
    S: int
    dtype: torch.dtype

    @property
    def pages(self) -> int:
        """Of a request."""
        return -(-self.T // self.S)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values."""
        return self.B * self.pages * self.S * self.H * 2 * self.D * self.dtype.itemsize


@dataclass(frozen=True)
class Content:
    """What the cache holds, as it was before it was paged."""

    keys: Tensor  # [B, T, H, D]
    values: Tensor  # [B, T, H, D]


class Layer:
    """An attention layer with its cache bound; without a policy it is stock vLLM."""

    def __init__(self, shape: Shape, policy: str | None = None) -> None:
        self.shape = shape
        self.config = engine_config(shape, policy)
        self.config.cache_config.kv_cache_layout = "LBHNC"  # the only one of vLLM's CPU backend
        default = torch.get_default_dtype()
        torch.set_default_dtype(shape.dtype)
        try:
            with set_current_vllm_config(self.config):
                self.attention = Attention(
                    shape.Hq, shape.D, shape.D**-0.5, shape.H,
                    cache_config=self.config.cache_config, prefix=LAYER,
                )  # fmt: skip
                backend = self.attention.attn_backend
                spec = backend.customize_spec(self.attention.get_kv_cache_spec(self.config))
                self.builder = backend.get_builder_cls()(spec, [LAYER], self.config, CPU)
        finally:
            torch.set_default_dtype(default)
        blocks = shape.B * shape.pages + 1  # block 0 is vLLM's null block
        group = KVCacheGroupSpec([LAYER], spec)
        planned = get_kv_cache_config_from_groups(
            self.config, [group], blocks * spec.page_size_bytes
        )
        layout = self.config.cache_config.get_resolved_kv_cache_layout()
        self.cache = allocate_kv_cache(planned, CPU, layout)[LAYER]
        assert len(self.cache) == blocks
        self.attention.bind_kv_cache(self.cache)
        self.impl: Any = self.attention.impl
        self.metadata: Any = None

    @property
    def bytes(self) -> int:
        """As allocated, digests included."""
        return self.cache.stride(0) * len(self.cache) * self.cache.element_size()

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """keys and values [tokens, H, D], slots [tokens] int64"""
        self.impl.do_kv_cache_update(self.attention, keys, values, self.cache, slots)

    def plan(self, page_table: Tensor, slots: Tensor, queries: int = 1) -> None:
        """Once a step: metadata for so many new tokens of each request, its last ones."""
        shape = self.shape
        bounds = torch.arange(shape.B + 1, dtype=torch.int32) * queries
        lengths = torch.full((shape.B,), shape.T, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=shape.B,
            num_actual_tokens=shape.B * queries,
            max_query_len=queries,
            max_seq_len=shape.T,
            block_table_tensor=page_table,
            slot_mapping=slots,
        )
        self.metadata = self.builder.build(0, common)

    def attend(self, query: Tensor, out: Tensor) -> None:
        """Once a layer. query and out [tokens, Hq, D]"""
        self.impl.forward(self.attention, query, None, None, self.cache, self.metadata, out)


def engine_config(shape: Shape, policy: str | None) -> Any:
    """The configuration of an engine that serves a Llama with these heads."""
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.Hq * shape.D,
        "intermediate_size": shape.Hq * shape.D,
        "num_attention_heads": shape.Hq,
        "num_key_value_heads": shape.H,
        "head_dim": shape.D,
        "num_hidden_layers": 4,
        "vocab_size": 512,
        "max_position_embeddings": shape.T,
    }
    options: dict[str, Any] = {}
    if policy is not None:
        options["attention_backend"] = "kvplug"
        options["additional_config"] = {"kvplug": {"policy": policy}}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        return EngineArgs(
            model=folder,
            dtype=str(shape.dtype).removeprefix("torch."),
            block_size=shape.S,
            max_model_len=shape.T,
            skip_tokenizer_init=True,
            enforce_eager=True,
            **options,
        ).create_engine_config()


def page_table(shape: Shape, shuffled: bool, random: torch.Generator) -> Tensor:
    """Blocks of each request, without vLLM's null block 0. -> [B, P] int32"""
    count = shape.B * shape.pages
    blocks = torch.randperm(count, generator=random) if shuffled else torch.arange(count)
    return (blocks + 1).int().view(shape.B, shape.pages)


def fill(
    layers: list[Layer], table: Tensor, random: torch.Generator, keep: bool
) -> Content | None:
    """Write the same random keys and values into every layer, as a prefill in chunks does."""
    shape = layers[0].shape
    chunks = []
    for row in table:
        for positions in torch.split(torch.arange(shape.T), 4096):
            both = torch.empty(2, len(positions), shape.H, shape.D)
            keys, values = both.normal_(generator=random).to(shape.dtype)
            slots = row[positions // shape.S].long() * shape.S + positions % shape.S
            for layer in layers:
                layer.write(keys, values, slots)
            if keep:
                chunks.append((keys, values))
    if not keep:
        return None
    written = (shape.B, shape.T, shape.H, shape.D)
    keys, values = (torch.cat(list(parts)).view(written) for parts in zip(*chunks, strict=True))
    return Content(keys, values)


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        (line,) = (line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10
