"""The mean query of each block, for what scores a block as if it were one query."""

from torch import Tensor

from kvplug_kernels.block_mean import reference
from kvplug_kernels.dispatch import wants_kernel
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes


def block_mean(query: Tensor, bounds: Tensor) -> Tensor:
    """query [T, Hq, D], bounds [n + 1] -> [n, Hq, D] fp32.

    The mean of rows bounds[i] to bounds[i + 1], and 0 where there are none. Raises ValueError on
    shapes.
    """
    shapes = Shapes(query.device)
    shapes.check("query", query, "T Hq D", FLOATS)
    shapes.check("bounds", bounds, "n+1", INDICES)
    if not len(bounds):
        raise ValueError("bounds must be [n + 1], a row where blocks begin at least, got [0]")
    if not wants_kernel(query):
        return reference.block_mean(query, bounds)
    from kvplug_kernels.block_mean import kernel

    return kernel.block_mean(query, bounds)


__all__ = ["block_mean"]
