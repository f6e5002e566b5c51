"""vLLM's CUDA path over CPU tensors: what users run, as far as a machine without a GPU can.

The engine, Model Runner V2, its graph manager with its padding and dispatch, FlashAttention's
backend, builder and implementation are vLLM's own. Stand-ins are FlashAttention's compiled
functions, over plain PyTorch that checks what the kernels only trust, and ``torch.cuda.CUDAGraph``
(``recorded``), so that what a decode step replays is what its graph captured.

It cannot show speed, races between streams, the numerics of a GPU's kernels or of bfloat16,
memory as a device allocates it, or what torch.compile makes of a model: those need a GPU. Of an
fp8 cache it has FlashAttention 3's contract (queries of e4m3 too, a scale for each sequence and KV
head) and not its numerics: the weights of a softmax are fp32 here, e4m3 there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from recorded import Graph, capture, opaque
from torch import Tensor

SIZES = [1, 4, 8]
"""Batches that are captured: others are padded, or run eagerly beyond them."""

OPERATIONS = ("page_bound", "page_select", "page_digest", "virtual_heads", "pack_tokens",
              "key_codes", "code_logits", "token_select", "sparse_decode", "encode_pages",
              "decode_pages", "coded_decode", "resident_pages")  # fmt: skip
NAMES = {"page_digest": "update_page_digest", "key_codes": "update_key_codes"}


def get_scheduler_metadata(
    *, batch_size: int, cache_seqlens: Tensor, cu_seqlens_q: Tensor, **_: Any
) -> Tensor:
    """FlashAttention 3's schedule: here simply what it is computed from, in its size."""
    schedule = torch.zeros(1 + (batch_size + 3) // 4 * 4 * 4, dtype=torch.int32)
    schedule[1 : 1 + batch_size] = cache_seqlens[:batch_size]
    queries = cu_seqlens_q[1 : batch_size + 1] - cu_seqlens_q[:batch_size]
    schedule[1 + batch_size : 1 + 2 * batch_size] = queries
    return schedule


class Flash:
    """``flash_attn_varlen_func`` as versions 2 and 3 are called by vLLM, and their contract."""

    version = 3
    calls = 0

    @classmethod
    def check(
        cls, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, seqused_k: Tensor,
        max_seqlen_k: int, block_table: Tensor, schedule: Tensor | None, num_splits: int,
    ) -> None:  # fmt: skip
        batch, size = len(seqused_k), k.shape[1]
        for name, tensor in (("block_table", block_table), ("seqused_k", seqused_k),
                             ("cu_seqlens_q", cu_seqlens_q)):  # fmt: skip
            assert tensor.dtype is torch.int32 and tensor.is_contiguous(), name
        assert q.stride(-1) == k.stride(-1) == 1
        assert q.dtype == k.dtype, f"queries {q.dtype} over keys {k.dtype}"
        assert len(cu_seqlens_q) == batch + 1 and len(block_table) >= batch, "sequences"
        bounds, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
        queries = [b - a for a, b in pairwise(bounds)]
        assert min(queries, default=0) >= 0, f"queries {bounds}"
        assert bounds[-1] <= len(q), f"queries {bounds} of {len(q)} rows"
        assert max(queries, default=0) <= max_seqlen_q, f"{queries} > max_seqlen_q {max_seqlen_q}"
        assert max(lengths, default=0) <= max_seqlen_k, f"{lengths} > max_seqlen_k {max_seqlen_k}"
        assert min(lengths, default=0) >= 0, f"lengths {lengths}"
        if cls.version == 2:
            assert size % 16 == 0, (
                f"version 2 reads pages of 16 tokens and their multiples: {size}"
            )
            assert num_splits <= 1 and schedule is None, "version 2 takes neither"
        if schedule is not None:
            own = get_scheduler_metadata(
                batch_size=batch, cache_seqlens=seqused_k, cu_seqlens_q=cu_seqlens_q
            )
            same = len(schedule) >= len(own) and torch.equal(schedule[: len(own)], own)
            assert same, "the schedule belongs to another batch"

    @classmethod
    def attend(
        cls, *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor,
        max_seqlen_q: int, seqused_k: Tensor, max_seqlen_k: int, softmax_scale: float,
        causal: bool, block_table: Tensor, scheduler_metadata: Tensor | None = None,
        window_size: Any = None, num_splits: int = 0, s_aux: Tensor | None = None,
        q_descale: Tensor | None = None, k_descale: Tensor | None = None,
        v_descale: Tensor | None = None, weights_out: Tensor | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """weights_out [Hq, N] takes the logarithm of what each query's tokens weigh."""
        cls.check(q, k, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, block_table,
                  scheduler_metadata, num_splits)  # fmt: skip
        assert s_aux is None or cls.version == 3, "version 2 knows no sinks"
        cls.calls += 1
        size, heads = k.shape[1:3]
        group, scales = q.shape[1] // heads, (q_descale, k_descale, v_descale)
        if q.dtype is torch.float8_e4m3fn:
            assert cls.version == 3 and out.dtype is not q.dtype, "version 3 alone reads fp8"
            for scale in scales:
                assert scale.dtype is torch.float32, "a scale is fp32"
                assert scale.shape == (len(seqused_k), heads), "of each sequence and KV head"
        bounds = cu_seqlens_q.tolist()
        for row, length in enumerate(seqused_k.tolist()):
            a, b = bounds[row], bounds[row + 1]
            if a == b:
                continue
            if length == 0:
                out[a:b] = 0
                continue
            pages = block_table[row, : -(-length // size)].long()
            assert len(pages) * size >= length, f"a block table too narrow for {length} tokens"
            assert pages.min() >= 0 and pages.max() < len(k), "a page out of bounds"
            keys = k[pages].flatten(0, 1)[:length].repeat_interleave(group, 1).float()
            values = v[pages].flatten(0, 1)[:length].repeat_interleave(group, 1).float()
            scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * softmax_scale
            if q.dtype is torch.float8_e4m3fn:
                asked, key, value = (each[row].repeat_interleave(group) for each in scales)
                scores *= (asked * key)[:, None, None]
                values *= value[:, None]
            if causal:
                last = torch.arange(length - (b - a), length)[:, None]
                hidden = torch.arange(length)[None] > last
                if window_size is not None and window_size[0] >= 0:
                    hidden |= torch.arange(length)[None] < last - window_size[0]
                scores.masked_fill_(hidden, float("-inf"))
            if weights_out is not None:
                weights_out[:, a:b] = scores.logsumexp(2)
            if s_aux is not None:
                sinks = s_aux.float()[:, None, None].expand(-1, b - a, 1)
                scores = torch.cat([scores, sinks], 2)
            weights = scores.softmax(-1)[..., :length]
            out[a:b] = torch.einsum("hqk,khd->qhd", weights, values)


def reshape_and_cache_flash(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor,
    kv_cache_dtype: str, k_scale: Tensor, v_scale: Tensor,
) -> None:  # fmt: skip
    if kv_cache_dtype in ("fp8", "fp8_e4m3"):
        assert key_cache.dtype is torch.uint8
        key, value = e4m3(key / k_scale), e4m3(value / v_scale)
        key_cache, value_cache = (each.view(key.dtype) for each in (key_cache, value_cache))
    rows = torch.nonzero(slots >= 0).flatten()
    size, slots = key_cache.shape[1], slots[rows]
    assert slots.unique().numel() == slots.numel(), "two tokens of a step share a slot"
    key_cache[slots // size, slots % size] = key[rows]
    value_cache[slots // size, slots % size] = value[rows]


def e4m3(numbers: Tensor) -> Tensor:
    """As CUDA converts them: the nearest, even ones first, and the greatest for what is beyond."""
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn)


def install(graphs: bool, version: int = 3) -> None:
    """After ``v2.install()``, before kvplug is imported.

    graphs: decode steps are captured and replayed. version: FlashAttention's.
    """
    if "TRITON_INTERPRET" not in os.environ:  # the plain operations wait for their tensors
        for name in OPERATIONS:
            module = importlib.import_module(f"kvplug_kernels.{name}")
            function = NAMES.get(name, name)
            setattr(module, function, opaque(getattr(module, function)))
    from vllm.v1.attention.backends import fa_utils

    Flash.version = version
    attend = opaque(Flash.attend)
    fa_utils.get_flash_attn_version = lambda *_, **__: version
    fa_utils.is_flash_attn_varlen_func_available = lambda: True
    fa_utils.flash_attn_supports_kv_cache_dtype = lambda dtype, **_: (
        version == 3 and dtype in ("fp8", "fp8_e4m3")  # on a GPU of compute capability 9
    )
    fa_utils.compile_flash_attn_varlen_func_from_specs = None
    fa_utils.flash_attn_varlen_func = attend
    fa_utils.get_scheduler_metadata = get_scheduler_metadata
    fa_utils.reshape_and_cache_flash = opaque(reshape_and_cache_flash)
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import flash_attn

    flash_attn._FA4_DENSE_ATTENTION_KERNEL = attend
    cls = type(current_platform)

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not None and selected_backend.name == "KVPLUG":
            return "kvplug_vllm.cuda.KVPlugBackend"
        return "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"

    get_attn_backend_cls._kvplug = True  # type: ignore[attr-defined]
    cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    if graphs:
        _install_graphs(cls)


class Capturing:
    """Whether engines that start now capture graphs, where graphs are installed."""

    enabled = True


@contextmanager
def eagerly() -> Iterator[None]:
    """Engines that start within capture nothing."""
    Capturing.enabled = False
    try:
        yield
    finally:
        Capturing.enabled = True


def _install_graphs(platform: Any) -> None:
    import vllm.v1.worker.cpu_worker as worker
    import vllm.v1.worker.gpu.cudagraph_utils as manager
    import vllm.v1.worker.gpu.model_runner as runner
    from vllm.config import VllmConfig
    from vllm.config.compilation import CUDAGraphMode

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture  # type: ignore[misc]
    torch.cuda.graph_pool_handle = lambda: (0, 0)  # type: ignore[assignment]
    platform.opaque_attention_op = classmethod(lambda cls: False)  # a capture must see inside
    platform.graph_pool_handle = classmethod(lambda cls: (0, 0))
    manager.current_stream = lambda: None
    runner.lock_workspace = lambda: None
    # PIECEWISE steps are padded as on a GPU, and run eagerly: there is no compiler.
    manager.has_compiled_submodule = runner.has_compiled_submodule = lambda model: True
    complete, warm_up = VllmConfig.__post_init__, worker.CPUWorker.compile_or_warm_up_model
    available = worker.CPUWorker.determine_available_memory

    def __post_init__(self: Any) -> None:
        asked, drafts = self.scheduler_config.async_scheduling, self.speculative_config
        complete(self)
        by_host = drafts is not None and drafts.method == "ngram"  # as vLLM decides on a GPU
        self.scheduler_config.async_scheduling = asked is not False and not by_host
        if not Capturing.enabled:
            return
        compilation = self.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        compilation.cudagraph_capture_sizes = SIZES
        compilation.max_cudagraph_capture_size = SIZES[-1]

    def compile_or_warm_up_model(self: Any) -> Any:
        times = warm_up(self)
        if Capturing.enabled:
            self.model_runner.capture_model()
        return times

    def determine_available_memory(self: Any) -> Any:
        """As on a GPU: a step without a cache, then graphs over a cache that is thrown away."""
        self.model_runner.profile_run()
        if Capturing.enabled:
            self.model_runner.profile_cudagraph_memory()
        return available(self)

    VllmConfig.__post_init__ = __post_init__
    worker.CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
    worker.CPUWorker.determine_available_memory = determine_available_memory
