"""Softmax attention of one query token per request over the chosen pages of each KV head."""

from torch import Tensor

from kvplug_kernels.dispatch import wants_kernel
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes
from kvplug_kernels.sparse_decode import reference


def sparse_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """query [B, Hq, D], keys and values [N, S, H, D], chosen [B, H, K] -> [B, Hq, D] as query.

    chosen holds counts [B, H] ascending logical pages, the last of which is the request's last
    page, filled as far as lengths [B] says. Zeros where counts is 0. Raises ValueError on shapes.
    """
    shapes = Shapes(query.device)
    shapes.check("query", query, "B Hq D", FLOATS)
    shapes.check("keys", keys, "N S H D", (query.dtype,))
    shapes.check("values", values, "N S H D", (query.dtype,))
    shapes.check("page_table", page_table, "B P", INDICES)
    shapes.check("chosen", chosen, "B H K", INDICES)
    shapes.check("counts", counts, "B H", INDICES)
    shapes.check("lengths", lengths, "B", INDICES)
    shapes.check_groups()
    if not wants_kernel(query):
        return reference.sparse_decode(
            query, keys, values, page_table, chosen, counts, lengths, scale
        )
    from kvplug_kernels.sparse_decode import kernel

    return kernel.sparse_decode(query, keys, values, page_table, chosen, counts, lengths, scale)


__all__ = ["sparse_decode"]
