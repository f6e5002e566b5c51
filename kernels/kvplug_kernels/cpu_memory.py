"""Tensors for Numba: an address and strides, and half precision as its bits.

Neither NumPy nor Numba has a bfloat16, and Numba has no float16 on CPUs. Addresses, because the
weights that pass through the caches between two layers leave none of our code in them: to wrap a
step's tensors as NumPy arrays would then take longer than to choose its pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from pickle import PickleError
from tempfile import TemporaryFile
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
ELEMENT = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float8_e4m3fn: np.uint8(0),
    torch.float8_e5m2: np.int8(0),
}
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
    return {
        types.uint16: bfloat16_as_fp32,
        types.int16: float16_as_fp32,
        types.uint8: e4m3_as_fp32,
        types.int8: e5m2_as_fp32,
    }.get(value, fp32_as_is)


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


def e4m3_as_fp32(value: Any) -> Any:
    """As ``float16_as_fp32``: exponents of 4 bits, mantissas of 3."""
    bits = np.uint32(value)
    small = np.uint32((bits & np.uint32(0x7F)) << np.uint32(20)).view(np.float32)
    size = np.float32(small * np.float32(2.0**120))
    sign = (bits & np.uint32(0x80)) << np.uint32(24)
    return np.uint32(size.view(np.uint32) | sign).view(np.float32)


def e5m2_as_fp32(value: Any) -> Any:
    """The upper byte of a float16."""
    bits = np.uint32(value)
    small = np.uint32((bits & np.uint32(0x7F)) << np.uint32(21)).view(np.float32)
    size = np.float32(small * np.float32(2.0**112))
    sign = (bits & np.uint32(0x80)) << np.uint32(24)
    return np.uint32(size.view(np.uint32) | sign).view(np.float32)


@cache
def store() -> str | None:
    """The folder of compiled code, of just these sources: Numba itself knows a function's file
    alone, not those of the functions that it calls. None where nothing can be kept."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    try:
        digest = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "kvplug" / f"numba-{numba.__version__}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError):
        return None


def compiled(function: Callable[..., None], stored: bool, **options: Any) -> Callable[..., None]:
    """By Numba, when it is called; stored for other processes if there is a folder for it."""
    users = numba.config.CACHE_DIR  # asked for when a function is wrapped, and never again
    numba.config.CACHE_DIR = (stored and store()) or users
    try:
        return numba.njit(cache=bool(stored and store()), **options)(function)
    finally:
        numba.config.CACHE_DIR = users


class Parallel:
    """A function with ``numba.prange``, compiled for one thread and, where work is worth it, for
    as many as torch takes: waking threads costs more than small work does.

    What the loop writes, a compiled function of its own must write: Numba takes memory that a
    parallel function reaches by an address for its own, and drops writes that it does not read.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.serial, self.parallel = self._compiled(stored=True)

    def _compiled(self, stored: bool) -> list[Callable[..., None]]:
        return [
            compiled(self.function, stored, parallel=parallel, fastmath=FAST_MATH, nogil=True)
            for parallel in (False, True)
        ]

    def __call__(self, work: int, *arguments: Any) -> None:
        """work: elements touched, roughly. The function's last argument is the threads it has."""
        try:
            self._run(work, arguments)
        except (OSError, EOFError, PickleError):  # of what is stored: compiled code raises none
            self.serial, self.parallel = self._compiled(stored=False)
            self._run(work, arguments)

    def _run(self, work: int, arguments: tuple[Any, ...]) -> None:
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if threads == 1 or work < WORTH_WAKING:
            return self.serial(*arguments, 1)
        numba.set_num_threads(threads)
        return self.parallel(*arguments, threads)
