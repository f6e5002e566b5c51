"""Min and max per channel of each page's keys, kept up to date as keys are written."""

from torch import Tensor, int64

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.page_digest import reference
from kvplug_kernels.shapes import FLOATS, Shapes, by_page, check_page_size


def update_page_digest(digest: Tensor, keys: Tensor, slots: Tensor, page_size: int) -> None:
    """digest [N, H, 2, D] (min, max) takes in keys [T, H, D] written at slots [T] int64.

    A slot is page * page_size + offset; negative ones are padding, and keys past the last slot are
    ignored. A page whose offset 0 arrives starts anew: what its digest held does not count. The
    tokens of one page stand side by side and ascend, as engines send them. Where blocks are K
    pages, digest is [N, K, H, 2, D], and page p is p % K of block p // K. Raises ValueError on
    shapes.
    """
    digest, shapes = by_page(digest), Shapes(digest.device)
    shapes.check("digest", digest, "N K H 2 D", (*FLOATS, *FP8))
    shapes.check("slots", slots, "T", (int64,))
    shapes.check("keys", keys[: slots.shape[0]], "T H D", (digest.dtype,))
    check_page_size(page_size)
    if not wants_kernel(digest):
        if wants_compiled(digest):
            from kvplug_kernels.page_digest import cpu

            return cpu.update_page_digest(digest, keys, slots, page_size)
        return reference.update_page_digest(digest, keys, slots, page_size)
    from kvplug_kernels.page_digest import kernel

    kernel.update_page_digest(digest, keys, slots, page_size)


__all__ = ["update_page_digest"]
