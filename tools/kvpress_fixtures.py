"""Ask kvpress which tokens it keeps, and write the answers down for tests/core/test_eviction.py.

    python3 -m venv /tmp/kvpress
    /tmp/kvpress/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    /tmp/kvpress/bin/pip install kvpress==0.5.5
    /tmp/kvpress/bin/python tools/kvpress_fixtures.py

which brings transformers 5.2.0 and numpy 2.4.6. Run once; an environment of its own because
kvpress asks for transformers < 5.3 and vLLM brings a later one.

Each press runs whole: ``compress`` on the hidden states and keys of one real LlamaAttention with
random weights (no attention weights are given, so SnapKV makes its window queries itself: projects
hidden states, rotates). No two keys are equal, so those that come back say what was kept. Written
beside it are the same window queries, computed with transformers' own rotation.

keys and values are drawn as halves of 16 bits, so that they are stored exactly in half the bytes.

Of KVzip the scores of one chunk are written, by each KV head: it shares its budget among heads.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress import (
    ChunkKVPress,
    CURPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    SnapKVPress,
)
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

OUT = Path(__file__).parents[1] / "tests/core/fixtures/kvpress.npz"

# requests, tokens, KV heads, query heads per KV head, head dim, window, pool, lag, shares evicted
SHAPES = [
    (2, 64, 2, 1, 16, 16, 5, 16, (0.25, 0.5)),
    (1, 77, 3, 3, 24, 32, 7, 16, (0.3, 0.5)),
    (2, 160, 2, 4, 16, 32, 5, 16, (0.5, 0.75)),
    (1, 320, 1, 3, 16, 64, 5, 32, (0.5, 0.75)),
    (1, 320, 2, 4, 16, 64, 1, 32, (0.2, 0.7)),
]
CHUNK = 24

# KV heads, query heads per KV head, head dim, where a chunk begins and ends, its first tokens
REPETITIONS = [(2, 3, 16, 0, 48, 4), (1, 4, 24, 64, 96, 4), (3, 1, 16, 32, 64, 0)]
CLEAR = 1e-6
"""Kept and evicted scores are at least so far apart, relatively: no other fp32 order of sums
changes a set."""


def kept(press: Any, module: Any, hidden: Any, keys: Any, values: Any, kwargs: Any) -> Any:
    """Ascending positions that a press keeps. -> [B, H, K]"""
    left = press.compress(module, hidden, keys, values, None, kwargs)[0]
    same = (left[:, :, :, None] == keys[:, :, None]).all(-1)  # [B, H, K, n]
    assert same.sum(-1).eq(1).all()
    tokens = same.float().argmax(-1)
    scorer, K = press, tokens.shape[-1]
    if isinstance(press, ChunkKVPress):
        scorer, K = press.press, len((tokens[0, 0] // press.chunk_length).unique())
    score = scorer.score(module, hidden, keys, values, None, kwargs)
    if isinstance(press, ChunkKVPress):
        score = torch.stack([part.mean(-1) for part in score.split(press.chunk_length, -1)], -1)
    score = score.sort(-1, descending=True)[0]
    gap = (score[..., K - 1] - score[..., K]) / score[..., K].abs()
    assert gap.min() > CLEAR, f"{press}: a tie, choose another seed"
    return tokens.sort(-1)[0].to(torch.int16).numpy()


def attention(H: int, G: int, D: int) -> tuple[LlamaConfig, LlamaAttention]:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=H * G, num_key_value_heads=H, head_dim=D
    )
    module = LlamaAttention(config, layer_idx=0)
    torch.nn.init.normal_(module.q_proj.weight, std=0.3)
    return config, module


def repeated(case: int) -> dict[str, np.ndarray]:
    """One chunk of a context, repeated behind it."""
    torch.manual_seed(case)
    H, G, D, begin, end, sinks = REPETITIONS[case]
    config, module = attention(H, G, D)
    W, n = end - begin, 2 * end - begin
    hidden = torch.randn(1, W, 32)
    cos, sin = LlamaRotaryEmbedding(config)(hidden, torch.arange(end, n)[None])
    keys = (torch.randn(1, H, n, D) + 0.3 * torch.randn(1, H, 1, D)).half().float()
    press = KVzipPress(0.5, n_sink=sinks)
    press.context_length, press.start_idx, press.end_idx = end, begin, end
    press.score_val = torch.zeros(1, 1, H, end)
    kwargs = {"position_embeddings": (cos, sin)}
    press.score_kvzip(module, hidden, keys, keys, None, kwargs)
    queries = module.q_proj(hidden).view(1, W, H * G, D).transpose(1, 2)
    queries = apply_rotary_pos_emb(queries, queries, cos, sin)[0]
    return {
        f"kvzip {case}/shape": np.array([begin, end, sinks]),
        f"kvzip {case}/keys": keys.transpose(1, 2).half().numpy(),  # [1, T, H, D]
        f"kvzip {case}/queries": (  # [1, W, H, G, D]
            queries.reshape(1, H, G, W, D).permute(0, 3, 1, 2, 4).contiguous().numpy()
        ),
        f"kvzip {case}/score": press.score_val[0, ..., begin:].numpy(),  # [1, H, T]
    }


@torch.no_grad()
def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for case in range(len(REPETITIONS)):
        arrays |= repeated(case)
    for case, (B, n, H, G, D, W, pool, lag, ratios) in enumerate(SHAPES):
        torch.manual_seed(case)
        config, module = attention(H, G, D)
        hidden = torch.randn(B, n, 32)
        cos, sin = LlamaRotaryEmbedding(config)(hidden, torch.arange(n)[None])
        kwargs = {"position_embeddings": (cos, sin)}

        keys = (torch.randn(B, H, n, D) + 0.3 * torch.randn(1, H, 1, D)).half().float()
        queries = module.q_proj(hidden).view(B, n, H * G, D).transpose(1, 2)
        queries = apply_rotary_pos_emb(queries, queries, cos, sin)[0][:, :, -W:]
        values = torch.randn(B, H, n, D) * (1 + torch.rand(B, H, n, 1))
        values = values.half().float()

        arrays[f"{case}/shape"] = np.array([B, n, H, G, D, W, pool, lag])
        arrays[f"{case}/keys"] = keys.transpose(1, 2).half().numpy()  # [B, T, H, D]
        arrays[f"{case}/values"] = values.transpose(1, 2).half().numpy()  # as keys
        arrays[f"{case}/queries"] = (  # [B, W, H, G, D]
            queries.reshape(B, H, G, W, D).permute(0, 3, 1, 2, 4).contiguous().numpy()
        )
        for ratio in ratios:
            presses = {
                "snapkv": SnapKVPress(ratio, window_size=W, kernel_size=pool),
                "keydiff": KeyDiffPress(ratio),
                "knorm": KnormPress(ratio),
                "lagkv": LagKVPress(ratio, lag_size=lag),
                "cur": CURPress(ratio),
            }
            if B == H == 1:  # it keeps one set of the first request, for all heads
                presses["chunkkv"] = ChunkKVPress(KeyDiffPress(ratio), chunk_length=CHUNK)
            for name, press in presses.items():
                tokens = kept(press, module, hidden, keys, values, kwargs)
                arrays[f"{case}/{name}/{tokens.shape[-1]}"] = tokens
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, version=np.array(version("kvpress")), **arrays)  # type: ignore[arg-type]
    print(f"{OUT}: {OUT.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
