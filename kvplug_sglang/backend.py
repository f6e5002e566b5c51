"""The class behind ``--attention-backend kvplug``: the device's stock backend plus a policy."""

from __future__ import annotations

from typing import Any

import torch

from kvplug_kernels.dispatch import interpreted
from kvplug_sglang import compat
from kvplug_sglang.settings import Engine

TRITON, FLASH, NATIVE = "triton", "fa3", "torch_native"
"""SGLang's names for what kvplug can wrap."""


def build(runner: Any) -> Any:
    """The stock backend that serves this device, planned; where pages are kept in a format, its
    kernels read none of them."""
    wrapped = stock(runner.server_args, torch.device(runner.device).type)
    if wrapped == NATIVE:
        from kvplug_sglang.cpu import KVPlugBackend
    elif wrapped == FLASH:
        from kvplug_sglang.cuda_flash import KVPlugBackend  # type: ignore[assignment]
    else:
        from kvplug_sglang.cuda_triton import KVPlugBackend  # type: ignore[assignment]
    if Engine.of(runner).offer.format is None:
        return KVPlugBackend(runner)
    from kvplug_sglang.coded import CodedAttention

    said = {"__module__": KVPlugBackend.__module__}
    return type("CodedBackend", (CodedAttention, KVPlugBackend), said)(runner)


def stock(server_args: Any, device: str) -> str:
    """What kvplug wraps here: SGLang's own default for the card and model where that is
    FlashAttention 3, elsewhere Triton; PyTorch's attention on a CPU."""
    if device == "cpu":
        return TRITON if interpreted() else NATIVE
    # FlashAttention 3 reads no cache of this type: SGLang's own default falls back in this way.
    reads = compat.view(server_args).kv_cache_dtype != "fp8_e5m2"
    return FLASH if reads and compat.default_attention(server_args) == FLASH else TRITON


def kernels(server_args: Any) -> str:
    """Whose attention kernels serve, and what is given up for them, for the start-up line."""
    view = compat.view(server_args)
    wrapped = stock(server_args, view.device)
    if view.device == "cpu":
        return f"SGLang's {wrapped} attention"
    default = compat.default_attention(server_args)
    prefill = "" if compat.captures_prefill(view) else "; prefill is not captured in graphs"
    if wrapped == default:
        said = f"SGLang's {wrapped} attention, its own default here{prefill}"
    else:
        said = (
            f"SGLang's {wrapped} attention in place of {default}, its own default here, which "
            f"kvplug cannot wrap: prefill and what no policy shortens may be slower than without "
            f"kvplug{prefill}"
        )
    return f"{said}; {ON_A_GPU}"


ON_A_GPU = "never run on a GPU"
"""Until results of an SGLang server on one are committed."""
