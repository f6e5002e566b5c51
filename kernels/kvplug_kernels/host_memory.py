"""Host memory that kernels read and write where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

MAPPED = 2
"""cudaHostRegisterMapped"""


class _Mapped:
    """Says where memory is as CUDA's array interface does, and keeps it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (len(memory),),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


def host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the device's whose numbers, anything yet, lie in host memory; of a CPU any.

    Exactly as many bytes are locked: torch's own pinned memory is rounded up to a power of two.
    Raises RuntimeError where the host has no room for them, or will not lock them.
    """
    if device.type == "cpu":
        return torch.empty(*shape, dtype=dtype)
    memory = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
    cudart: Any = torch.cuda.cudart()
    failed = int(cudart.cudaHostRegister(memory.data_ptr(), len(memory), MAPPED))
    if failed:
        raise RuntimeError(
            f"the host will not lock {len(memory) / (1 << 20):,.0f} MiB of memory for the GPU "
            f"(CUDA error {failed}); ask for less, or raise its limit (ulimit -l)"
        )
    return torch.as_tensor(_Mapped(memory), device=device).view(dtype).view(*shape)
