"""Tensors for Numba: an address and strides, and half precision as its bits.

Neither NumPy nor Numba has a bfloat16, and Numba has no float16 on CPUs. Addresses, because the
weights that pass through the caches between two layers leave none of our code in them: to wrap a
step's tensors as NumPy arrays would then take longer than to choose its pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

numba.config.THREADING_LAYER = "omp"  # torch's own threads; two pools would fight for the cores
WORTH_WAKING = 1 << 18
FAST_MATH = {"contract", "reassoc", "nsz"}  # sums may be reordered; NaN and infinity stay
ELEMENT = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}
"""What stands for an element of a dtype where ``widen`` is to know it."""
INT32, INT64 = np.int32(0), np.int64(0)
FP32, UINT8 = np.float32(0), np.uint8(0)


def place(tensor: Tensor) -> tuple[int, ...]:
    """(address, stride, stride, ...), strides in elements."""
    return tensor.data_ptr(), *tensor.stride()


@intrinsic
def pointer(typing_context: Any, address: Any, begin: Any, element: Any) -> Any:
    """Of an element by its number from an address on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
        return builder.gep(first, [arguments[1]])

    return types.CPointer(element)(address, begin, element), generate


@numba.njit(inline="always")
def span(address: Any, begin: Any, count: Any, element: Any) -> Any:
    """Contiguous memory as an array, so that loops over it are vectorised."""
    return numba.carray(pointer(address, begin, element), (count,))


@intrinsic
def prefetch_line(typing_context: Any, address: Any) -> Any:
    """Start to load 64 bytes into a core's second cache, whose misses may be many at once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        read, second_cache, data = number(0), number(2), number(1)
        address = builder.inttoptr(arguments[0], byte)
        builder.call(function, [address, read, second_cache, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@numba.njit(inline="always")
def prefetch(row: Any) -> Any:
    begin = row.ctypes.data
    for address in range(begin, begin + row.size * row.itemsize, 64):
        prefetch_line(address)


def widen(value: Any) -> Any:
    """An element as fp32, in compiled code."""
    raise NotImplementedError


@overload(widen, inline="always")
def compile_widen(value: Any) -> Any:
    return {types.uint16: bfloat16_as_fp32, types.int16: float16_as_fp32}.get(value, fp32_as_is)


def fp32_as_is(value: Any) -> Any:
    return value


def bfloat16_as_fp32(value: Any) -> Any:
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def float16_as_fp32(value: Any) -> Any:
    """Exact, subnormals too; but infinity and NaN become numbers beyond the largest float16."""
    bits = np.uint32(value)
    small = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
    size = np.float32(small * np.float32(2.0**112))  # exponents of 5 bits, then of 8
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    return np.uint32(size.view(np.uint32) | sign).view(np.float32)


class Parallel:
    """A function with ``numba.prange``, compiled for one thread and, where work is worth it, for
    as many as torch takes: waking threads costs more than small work does.

    What the loop writes, a compiled function of its own must write: Numba takes memory that a
    parallel function reaches by an address for its own, and drops writes that it does not read.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.serial = numba.njit(fastmath=FAST_MATH, nogil=True)(function)
        self.parallel = numba.njit(parallel=True, fastmath=FAST_MATH, nogil=True)(function)

    def __call__(self, work: int, *arguments: Any) -> None:
        """work: elements touched, roughly. The function's last argument is the threads it has."""
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if threads == 1 or work < WORTH_WAKING:
            return self.serial(*arguments, 1)
        numba.set_num_threads(threads)
        return self.parallel(*arguments, threads)
