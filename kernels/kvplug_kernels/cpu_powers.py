"""Powers of two for Numba, whose own are calls that LLVM does not take eight at a time."""

from __future__ import annotations

from math import factorial, log
from typing import Any

import numba
import numpy as np

from kvplug_kernels.cpu_memory import FP32

LEAST_EXPONENT = np.float32(-126)  # of a normal number
# 2**x = sum_k ((ln 2)**k / k!) x**k, to 2e-7 for half an exponent on either side
TAYLOR = tuple(np.float32(log(2) ** k / factorial(k)) for k in range(7))


@numba.njit(inline="always")
def power_of_two(x: Any) -> Any:
    """2**x for x at most 0, down to the least normal number."""
    x = max(min(x, FP32), LEAST_EXPONENT)
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    value = TAYLOR[6]
    value = value * f + TAYLOR[5]
    value = value * f + TAYLOR[4]
    value = value * f + TAYLOR[3]
    value = value * f + TAYLOR[2]
    value = value * f + TAYLOR[1]
    value = value * f + TAYLOR[0]
    bits = np.float32(value).view(np.int32) + (np.int32(whole) << np.int32(23))
    return np.int32(bits).view(np.float32)
