"""The class behind ``--attention-backend kvplug``: the device's stock backend plus a policy."""

from __future__ import annotations

from typing import Any


def build(runner: Any) -> Any:
    """The stock backend that serves this device, planned."""
    import torch

    from kvplug_sglang import compat

    if torch.device(runner.device).type == "cpu" and not compat.interpreted():
        from kvplug_sglang.cpu import KVPlugBackend
    else:
        from kvplug_sglang.cuda import KVPlugBackend  # type: ignore[assignment]
    return KVPlugBackend(runner)
