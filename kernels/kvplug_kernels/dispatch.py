"""Which implementation serves a tensor: the kernel on a GPU, the reference on a CPU."""

import os

from torch import Tensor


def interpreted() -> bool:
    """Triton runs kernels on the CPU when TRITON_INTERPRET=1 was set before its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def wants_kernel(tensor: Tensor) -> bool:
    return tensor.is_cuda or interpreted()
