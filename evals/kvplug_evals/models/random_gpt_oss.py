"""A small random model with attention sinks, as ``random_llama``'s."""

from __future__ import annotations

from pathlib import Path

from kvplug_evals.models.random_llama import randomize, save, shape_of


def build_random_gpt_oss(folder: Path, *, seed: int = 0) -> None:
    """gpt-oss: windowed layers between global ones, experts, a sink of its own for each head."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = shape_of(heads=4, kv_heads=2, head_dim=64, layers=4, vocab=512, max_positions=8192)
    config = GptOssConfig(
        **shape,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=128,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = GptOssForCausalLM(config)
    randomize(model, embedding=1.0, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            weight.data.normal_(3.0, 2.0, generator=random)  # of much of the weight
        elif "bias" in name:
            weight.data.zero_()
    save(model, folder, "float32")
