"""Softmax attention of one query token per request over what each KV head chose."""

from torch import Tensor

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes, check_unit
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
    unit: int | None = None,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    """query [B, Hq, D], keys and values [N, S, H, D], chosen [B, H, K] -> [B, Hq, D] as query.

    chosen holds counts [B, H] ascending units of so many tokens, pages unless said (1: tokens),
    the last of which is the request's last, filled as far as lengths [B] says. Pages may lie by
    any strides, in the query's dtype or in eight bits; what those are to be multiplied by is the
    caller's, keys in scale and values in what returns. A cap above 0 bounds the scaled logits to
    cap * tanh(logit / cap). sinks [Hq] are logits beside those, of which nothing is read. Zeros
    where counts is 0. Raises ValueError on shapes and unit.
    """
    shapes = Shapes(query.device)
    shapes.check("query", query, "B Hq D", FLOATS)
    shapes.check("keys", keys, "N S H D", (query.dtype, *FP8), strided=True)
    shapes.check("values", values, "N S H D", (keys.dtype,), strided=True)
    shapes.check("page_table", page_table, "B P", INDICES)
    shapes.check("chosen", chosen, "B H K", INDICES)
    shapes.check("counts", counts, "B H", INDICES)
    shapes.check("lengths", lengths, "B", INDICES)
    shapes.check_groups()
    unit = check_unit(unit, shapes["S"])
    if sinks is not None:
        shapes.check("sinks", sinks, "Hq", FLOATS)
    arguments = (query, keys, values, page_table, chosen, counts, lengths, scale, unit, sinks, cap)
    if not wants_kernel(query):
        if wants_compiled(query):
            from kvplug_kernels.sparse_decode import cpu

            return cpu.sparse_decode(*arguments)
        return reference.sparse_decode(*arguments)
    from kvplug_kernels.sparse_decode import kernel

    return kernel.sparse_decode(*arguments)


__all__ = ["sparse_decode"]
