"""Strided tensors for Numba: flat storage and offsets, and bfloat16 as what it is, half an fp32.

A loop over a strided array is not vectorised, one over a flat array is; and neither NumPy nor
Numba has a bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

numba.config.THREADING_LAYER = "omp"  # torch's own threads; two pools would fight for the cores
WORTH_WAKING = 1 << 18


def flat(tensor: Tensor) -> Any:
    """The storage of a tensor, flat: fp32, or the bits of bfloat16 as uint16."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((elements,), (1,), 0)
    if tensor.dtype is torch.bfloat16:
        return storage.view(torch.int16).numpy().view(np.uint16)
    return storage.numpy()


class Parallel:
    """A function with ``numba.prange``, compiled for one thread and, where work is worth it, for
    as many as torch takes: waking threads costs more than small work does."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.serial = numba.njit(fastmath={"contract", "reassoc", "nsz"}, nogil=True)(function)
        self.parallel = numba.njit(
            parallel=True, fastmath={"contract", "reassoc", "nsz"}, nogil=True
        )(function)

    def __call__(self, work: int, *arguments: Any) -> None:
        """work: elements touched, roughly."""
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if threads == 1 or work < WORTH_WAKING:
            return self.serial(*arguments)
        numba.set_num_threads(threads)
        return self.parallel(*arguments)


@numba.njit(inline="always")
def widen(value: Any) -> Any:
    """An element of ``flat`` as fp32."""
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
