"""The class behind ``--attention-backend kvplug``: the device's stock backend plus a policy."""

from __future__ import annotations

from typing import Any

import torch

from kvplug_kernels.dispatch import interpreted


def build(runner: Any) -> Any:
    """The stock backend that serves this device, planned."""
    if torch.device(runner.device).type == "cpu" and not interpreted():
        from kvplug_sglang.cpu import KVPlugBackend
    else:
        from kvplug_sglang.cuda import KVPlugBackend  # type: ignore[assignment]
    return KVPlugBackend(runner)
