"""vLLM's CPU kernel over a cache of eight bits, on CPUs where it has none: it wants AVX-512.

The engine, its backend and its builder are vLLM's own. Stand-ins are three compiled functions, as
``csrc/cpu`` has them for the instruction set "vec": a head's page is keys [D, S], then values
[S, D]; numbers are cut off, not rounded, once they are divided by their layer's scale; queries
stay what the model computes in, and scales come to the logits and to what is read. It cannot show
the kernel's own numerics or speed, nor the tiles in which AMX keeps a page.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

NUMBERS = {
    "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip


def cut(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to eight bits, towards zero; the greatest for what is beyond."""
    e4m3 = dtype is torch.float8_e4m3fn
    mantissa, shift, most = (20, 2.0**-120, 448.0) if e4m3 else (21, 2.0**-112, 57344.0)
    bits = (numbers.float().clamp(-most, most) * shift).view(torch.int32)
    size = (bits >> mantissa) & 0x7F
    return (((bits >> 24) & 0x80) | size).to(torch.uint8).view(dtype)


def pages(key_cache: Tensor, value_cache: Tensor, kv_cache_dtype: str) -> tuple[Tensor, Tensor]:
    """Halves [N, H, S, D] of a cache of bytes, as [N, S, H, D] numbers."""
    N, H, S, D = key_cache.shape
    assert key_cache.dtype is value_cache.dtype is torch.uint8
    page, head, _, _ = key_cache.stride()
    found = []
    for half, token, channel in ((key_cache, 1, S), (value_cache, D, 1)):
        numbers = half.view(NUMBERS[kv_cache_dtype])
        strides = (page, token, head, channel)
        found.append(numbers.as_strided((N, S, H, D), strides, half.storage_offset()))
    return found[0], found[1]


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, isa: str,
    k_scale: float, v_scale: float, kv_cache_dtype: str,
) -> None:  # fmt: skip
    assert isa == "vec" and k_scale > 0 and v_scale > 0
    caches = pages(key_cache, value_cache, kv_cache_dtype)
    rows = torch.nonzero(slots >= 0).flatten()
    S = key_cache.shape[2]
    for new, cache, scale in zip((key, value), caches, (k_scale, v_scale), strict=True):
        divided = new[rows].float() * (1 / scale)
        cache[slots[rows] // S, slots[rows] % S] = cut(divided, cache.dtype)


def scheduler_metadata(num_reqs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """What the kernel holds a call to."""
    return torch.tensor([num_reqs, num_heads, num_kv_heads, head_dim])


def attend(
    *, query: Tensor, key_cache: Tensor, value_cache: Tensor, output: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, scale: float, causal: bool, sliding_window: int,
    block_table: Tensor, softcap: float, scheduler_metadata: Tensor, k_scale: float,
    v_scale: float, kv_cache_dtype: str, alibi_slopes: None, s_aux: None, dynamic_causal: None,
) -> None:  # fmt: skip
    assert causal and not softcap
    assert alibi_slopes is s_aux is dynamic_causal is None
    assert query.dtype == output.dtype and output.is_contiguous()
    keys, values = pages(key_cache, value_cache, kv_cache_dtype)
    S, H = keys.shape[1:3]
    planned = [len(seq_lens), query.shape[1], H, query.shape[2]]
    assert scheduler_metadata.tolist() == planned, "the metadata belongs to another batch"
    group = query.shape[1] // H
    for row, (a, b) in enumerate(pairwise(query_start_loc.tolist())):
        length = int(seq_lens[row])
        if a == b:
            continue
        read = block_table[row, : -(-length // S)].long()
        k, v = (each[read].flatten(0, 1)[:length].float() for each in (keys, values))
        k, v = (each.repeat_interleave(group, 1) for each in (k, v))
        logits = torch.einsum("qhd,khd->hqk", query[a:b].float(), k) * (scale * k_scale)
        last = torch.arange(length - (b - a), length)[:, None]
        hidden = torch.arange(length) > last
        if sliding_window != -1:  # tokens, the query's own among them
            hidden |= torch.arange(length) <= last - sliding_window
        logits.masked_fill_(hidden, float("-inf"))
        output[a:b] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v) * v_scale


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For engines that start from now on; nothing where the kernel itself runs."""
    if torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported():
        return
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import cpu_attn

    choose = cpu_attn._get_attn_isa

    def instructions(
        dtype: torch.dtype, block: int, head: int | None = None, cache: str | None = None
    ) -> str:
        return "vec" if cache in NUMBERS else choose(dtype, block, head, cache)

    def supports(cls: Any, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype in (None, *cls.supported_kv_cache_dtypes)

    stock = {
        name: getattr(ops, name)
        for name in (
            "cpu_attn_get_scheduler_metadata",
            "cpu_attn_reshape_and_cache",
            "cpu_attention_with_kv_cache",
        )
    }

    def plan(*, kv_cache_dtype: str = "auto", **given: Any) -> Tensor:
        if kv_cache_dtype not in NUMBERS:
            return stock["cpu_attn_get_scheduler_metadata"](kv_cache_dtype=kv_cache_dtype, **given)
        heads = {name: given[name] for name in ("num_heads", "num_kv_heads", "head_dim")}
        return scheduler_metadata(given["num_reqs"], **heads)

    def write(*args: Any, kv_cache_dtype: str = "auto", **given: Any) -> None:
        plain = kv_cache_dtype not in NUMBERS
        function = stock["cpu_attn_reshape_and_cache"] if plain else reshape_and_cache
        function(*args, kv_cache_dtype=kv_cache_dtype, **given)

    def read(*, kv_cache_dtype: str = "auto", **given: Any) -> None:
        plain = kv_cache_dtype not in NUMBERS
        function = stock["cpu_attention_with_kv_cache"] if plain else attend
        function(kv_cache_dtype=kv_cache_dtype, **given)

    backend = cpu_attn.CPUAttentionBackend
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", instructions)
    monkeypatch.setattr(backend, "supports_kv_cache_dtype", classmethod(supports))
    monkeypatch.setattr(ops, "cpu_attn_get_scheduler_metadata", plan)
    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", write)
    monkeypatch.setattr(ops, "cpu_attention_with_kv_cache", read)
