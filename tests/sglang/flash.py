"""FlashAttention 3 as SGLang calls it, held to the contract that vLLM's calls are held to."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from cuda_path import Flash, get_scheduler_metadata
from recorded import opaque
from torch import Tensor

MEANS_MORE = ("k", "v", "qv", "rotary_cos", "cache_batch_idx", "cache_leftpad", "q_descale")


@opaque
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, page_table: Tensor, cache_seqlens: Tensor,
    cu_seqlens_q: Tensor, max_seqlen_q: int, softmax_scale: float, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, num_splits: int = 0,
    scheduler_metadata: Tensor | None = None, out: Tensor | None = None,
    sinks: Tensor | None = None, return_softmax_lse: bool = False,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, **more: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    unknown = [name for name in MEANS_MORE if more.get(name) is not None]
    assert not unknown, f"the stand-in knows no {unknown}"
    assert not softcap, "nor this"
    assert len(page_table) == len(cache_seqlens) == len(cu_seqlens_q) - 1, "sequences"
    assert q.is_contiguous()
    assert out is None or out.shape == q.shape
    assert v_cache.shape[:3] == k_cache.shape[:3]
    if out is None:
        dtype = torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype
        out = torch.full_like(q, float("nan"), dtype=dtype)
    one = torch.ones(len(cache_seqlens), k_cache.shape[2])
    weights = None
    if return_softmax_lse:
        weights = q.new_full((q.shape[1], len(q)), float("-inf"), dtype=torch.float32)
    Flash.attend(
        q=q, k=k_cache, v=v_cache, out=out, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        seqused_k=cache_seqlens, max_seqlen_k=page_table.shape[1] * k_cache.shape[1],
        softmax_scale=softmax_scale, causal=causal, block_table=page_table,
        scheduler_metadata=scheduler_metadata, window_size=window_size, num_splits=num_splits,
        s_aux=sinks, weights_out=weights, q_descale=one,
        k_descale=one if k_descale is None else k_descale,
        v_descale=one if v_descale is None else v_descale,
    )  # fmt: skip
    return out if weights is None else (out, weights)


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Before a scheduler is started: kvplug wraps FlashAttention 3, as on Hopper, and
    ``--attention-backend fa3`` is it."""
    kernels = ModuleType("sgl_kernel.flash_attn")
    kernels.flash_attn_with_kvcache = flash_attn_with_kvcache
    kernels.flash_attn_varlen_func = None
    kernels.get_scheduler_metadata = get_scheduler_metadata
    sys.modules["sgl_kernel.flash_attn"] = kernels
    from sglang.kernels.ops.attention import flash_attention
    from sglang.srt.layers.attention import attention_registry as registry
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
    from sglang.srt.mem_cache import kv_cache_configurator

    from kvplug_sglang import backend

    # A CPU has a cache of eight bits for its AMX attention alone.
    platform = copy.copy(kv_cache_configurator.current_platform)
    platform.is_cpu = lambda: False
    put(kv_cache_configurator, "current_platform", platform)

    put(flash_attention, "fa3_flash_attn_with_kvcache", flash_attn_with_kvcache)
    registry.ATTENTION_BACKENDS[backend.FLASH] = FlashAttentionBackend
    put(backend, "stock", lambda server_args, device: backend.FLASH)
