"""A full page's keys in 1, 2, 4 or 8 bits per channel, kept behind the page (KIVI's grouping)."""

from torch import Tensor, int64

from kvplug_kernels.code_layout import check_rows, code_rows
from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.key_codes import reference
from kvplug_kernels.shapes import FLOATS, Shapes, by_page


def update_key_codes(codes: Tensor, keys: Tensor, slots: Tensor, bits: int) -> None:
    """codes [N, H, R, D] of the pages in keys [N, S, H, D] that slots [T] int64 complete.

    A slot is page * S + offset, negative ones are padding. A page whose offset S - 1 is among them
    is coded from its keys as they lie in the cache, whose strides may be any. lo is the lowest key
    of a channel, step the least positive number of the cache's dtype that takes lo + (2**bits - 1)
    * step to the highest, or its greatest, and each key has the nearest code. R is ``code_rows``;
    ``code_layout`` says how they lie. Where blocks are K pages of S, codes are [N, K, H, R, D],
    keys [N, K * S, H, D], and page p is p % K of block p // K. Raises ValueError on shapes, bits
    and S.
    """
    codes, shapes = by_page(codes), Shapes(codes.device)
    shapes.check("codes", codes, "N K H R D", (*FLOATS, *FP8))
    shapes.check("keys", keys, "N S H D", (codes.dtype,), strided=True)
    shapes.check("slots", slots, "T", (int64,))
    check_rows(codes, keys.shape[1] // codes.shape[1], bits)
    if not wants_kernel(codes):
        if wants_compiled(codes):
            from kvplug_kernels.key_codes import cpu

            return cpu.update_key_codes(codes, keys, slots, bits)
        return reference.update_key_codes(codes, keys, slots, bits)
    from kvplug_kernels.key_codes import kernel

    kernel.update_key_codes(codes, keys, slots, bits)


__all__ = ["code_rows", "update_key_codes"]
