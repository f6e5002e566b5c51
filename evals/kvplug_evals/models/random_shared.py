"""Small random models whose last layers read another layer's cache, as ``random_llama``'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvplug_evals.models.random_llama import randomize, save, shape_of

LAYERS = ["sliding_attention", "full_attention"] * 3


def build_random_gemma4(folder: Path, *, seed: int = 0) -> None:
    """A text-only Gemma 4: of three layers that see all, the last reads the second's cache."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**_shape(), global_head_dim=64, hidden_size_per_layer_input=0)
    _build(Gemma4ForCausalLM(config), folder, seed)


def build_random_gemma3n(folder: Path, *, seed: int = 0) -> None:
    """A text-only Gemma 3n, layers as above."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        **_shape(),
        hidden_size_per_layer_input=32,
        laurel_rank=16,
        activation_sparsity_pattern=[0.0] * len(LAYERS),
    )
    _build(Gemma3nForCausalLM(config), folder, seed)


def _shape() -> dict[str, Any]:
    shape = shape_of(
        heads=4, kv_heads=2, head_dim=64, layers=len(LAYERS), vocab=512, max_positions=8192
    )
    return {
        **shape,
        "layer_types": LAYERS,
        "num_kv_shared_layers": 2,
        "sliding_window": 128,
        "vocab_size_per_layer_input": 512,
    }


def _build(model: Any, folder: Path, seed: int) -> None:
    # The head is tied: a token that stood out in the residual would only repeat itself.
    randomize(model, embedding=0.1 / model.config.hidden_size**0.5, seed=seed)
    save(model, folder, "float32")
