"""A small random model whose layers attend within chunks, as ``random_llama``'s."""

from __future__ import annotations

from pathlib import Path

from kvplug_evals.models.random_llama import SHARPNESS, randomize, save, shape_of


def build_random_llama4(folder: Path, *, chunk: int = 128, seed: int = 0) -> None:
    """A text-only Llama 4: each fourth layer sees all, without positions; the others see what is
    of their chunk of so many tokens, and normalise queries and keys. Experts in each second."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    shape = shape_of(heads=4, kv_heads=2, head_dim=64, layers=4, vocab=512, max_positions=8192)
    config = Llama4TextConfig(
        **shape,
        intermediate_size_mlp=512,
        attention_chunk_size=chunk,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        floor_scale=256,  # queries of long contexts are scaled within a test's
    )
    model = Llama4ForCausalLM(config)
    randomize(model, embedding=1.0, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 3:  # of experts, whose rows are inputs
            weight.data.normal_(0.0, weight.shape[1] ** -0.5, generator=random)
        elif "layers.3.self_attn.q_proj" in name:
            weight.data.mul_(SHARPNESS)
    save(model, folder, "float32")
