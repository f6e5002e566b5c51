"""Which implementation serves a tensor: the kernel on a GPU, compiled code or torch on a CPU."""

import os

import torch
from torch import Tensor

from kvplug_kernels.fp8 import FP8

COMPILED = (torch.float32, torch.bfloat16, torch.float16, torch.int32, *FP8)


def interpreted() -> bool:
    """Triton runs kernels on the CPU when TRITON_INTERPRET=1 was set before its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def wants_kernel(tensor: Tensor) -> bool:
    return tensor.is_cuda or interpreted()


class CompiledCpu:
    """Numba's code serves CPU tensors once ``kvplug_kernels.warm_up`` has compiled it."""

    enabled = False


def wants_compiled(tensor: Tensor) -> bool:
    """Otherwise the reference serves."""
    return CompiledCpu.enabled and tensor.device.type == "cpu" and tensor.dtype in COMPILED
