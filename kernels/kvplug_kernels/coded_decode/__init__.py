"""Softmax attention of one query token over what each KV head chose of pages of codes.

Pages before a query's newest hold codes; its newest lies as it is in a cache beside.
"""

from torch import Tensor

from kvplug_kernels.coded_decode import reference
from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.page_layout import Coded, PageLayout
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes, check_unit


def coded_decode(
    query: Tensor,
    cache: Coded,
    layout: PageLayout,
    open_keys: Tensor,
    open_values: Tensor,
    open_page: Tensor,
    page_table: Tensor,
    chosen: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    scale: float,
    unit: int | None = None,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    """query [Q, Hq, D], cache [N, H, page_bytes] uint8 of layout, open_keys and open_values
    [M, S, H, D], open_page [Q], page_table [Q, P], lengths [Q] -> [Q, Hq, D] as query.

    Token t of query q, below lengths[q], stands in page t // S of its row, whose codes are at
    page_table[q, t // S]; those of the newest page, (lengths[q] - 1) // S, full or not, are
    open_keys[open_page[q]] and open_values[open_page[q]], by any strides, and its column of the
    table is not followed. chosen [Q, H, K] holds counts [Q, H] ascending units of so many tokens,
    pages unless said (1: tokens), the last of which is the query's last, filled as far as lengths
    says; None, with counts None, is all. query and open pages have layout.dtype. A cap above 0
    bounds the scaled logits to cap * tanh(logit / cap); sinks [Hq] are logits beside those. Zeros
    where counts or lengths is 0. Raises ValueError on shapes, layout and unit.
    """
    views, shapes = layout.views(cache), Shapes(query.device)
    shapes.lengths |= {"S": layout.page_size, "D": layout.head_size}
    shapes.check("query", query, "Q Hq D", (layout.dtype,))
    shapes.check("the cache's keys", views.keys, "N H R D", (layout.dtype,))
    shapes.check("open_keys", open_keys, "M S H D", (layout.dtype,), strided=True)
    shapes.check("open_values", open_values, "M S H D", (layout.dtype,), strided=True)
    shapes.check("open_page", open_page, "Q", INDICES)
    shapes.check("page_table", page_table, "Q P", INDICES)
    shapes.check("lengths", lengths, "Q", INDICES)
    shapes.check_groups()
    unit = check_unit(unit, layout.page_size)
    if (chosen is None) != (counts is None):
        raise ValueError("chosen and counts go together: both, or neither to read everything")
    if chosen is not None and counts is not None:
        shapes.check("chosen", chosen, "Q H K", INDICES)
        shapes.check("counts", counts, "Q H", INDICES)
    if sinks is not None:
        shapes.check("sinks", sinks, "Hq", FLOATS)
    arguments = (
        query, views, layout, open_keys, open_values, open_page, page_table, chosen, counts,
        lengths, scale, unit if chosen is not None else layout.page_size, sinks, cap,
    )  # fmt: skip
    if wants_kernel(query):
        from kvplug_kernels.coded_decode import kernel

        return kernel.coded_decode(*arguments)
    if wants_compiled(query):
        from kvplug_kernels.coded_decode import cpu

        if cpu.compiles(layout):
            return cpu.coded_decode(*arguments)
    return reference.coded_decode(*arguments)


__all__ = ["coded_decode"]
