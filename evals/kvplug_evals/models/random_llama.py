"""Small random models: for the equality of tokens, not for answers.

Two engines that differ would still agree on a model that repeats one token. So the scale of the
weights is chosen such that greedy decoding wanders, and follows from the whole context: another
first third of the prompt gives other tokens throughout.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvplug_evals.models.folder import new_folder, write_word_tokenizer

SHARPNESS = 2  # times the usual scale of queries and keys: scores spread over about +-4


def build_random_llama(
    folder: Path,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    layers: int = 2,
    vocab: int = 512,
    max_positions: int = 8192,
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """A Llama with grouped-query attention; all heads see the whole context."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_of(heads, kv_heads, head_dim, layers, vocab, max_positions)
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    randomize(model, embedding=1.0, seed=seed)
    save(model, folder, dtype)


def build_random_gemma3(
    folder: Path,
    *,
    window: int = 128,
    layer_types: Sequence[str] = ("sliding_attention", "full_attention") * 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    vocab: int = 512,
    max_positions: int = 8192,
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """A text-only Gemma 3: layers that see `window` tokens between layers that see all."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = shape_of(heads, kv_heads, head_dim, len(layer_types), vocab, max_positions)
    config = Gemma3TextConfig(
        **shape,
        layer_types=list(layer_types),
        sliding_window=window,
        query_pre_attn_scalar=head_dim // SHARPNESS**4,  # queries and keys are normalised
    )
    model = Gemma3ForCausalLM(config)
    # The head is tied: a token that stood out in the residual would only repeat itself.
    randomize(model, embedding=0.1 / config.hidden_size**0.5, seed=seed)
    save(model, folder, dtype)


def build_random_gemma2(folder: Path, *, seed: int = 0) -> None:
    """Windowed layers between global ones, and a cap that attention's logits come near."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **shape_of(4, 2, 64, 4, 512, 8192),
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=128,
        query_pre_attn_scalar=64,
        attn_logit_softcapping=3.0,
    )
    model = Gemma2ForCausalLM(config)
    randomize(model, embedding=0.1 / config.hidden_size**0.5, seed=seed)
    save(model, folder, "float32")


def shape_of(
    heads: int, kv_heads: int, head_dim: int, layers: int, vocab: int, max_positions: int
) -> dict[str, Any]:
    hidden = heads * head_dim
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def randomize(model: Any, *, embedding: float, seed: int) -> None:
    import torch

    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue  # norms keep what their architecture starts with
        scale = weight.shape[1] ** -0.5
        if "embed_tokens" in name:
            scale = embedding
        elif "q_proj" in name or "k_proj" in name:
            scale *= SHARPNESS
        weight.data.normal_(0.0, scale, generator=random)


def save(model: Any, folder: Path, dtype: str) -> None:
    import torch

    with new_folder(folder) as draft:
        model.to(getattr(torch, dtype)).save_pretrained(draft)
        write_word_tokenizer(draft, [f"t{token}" for token in range(model.config.vocab_size)])
