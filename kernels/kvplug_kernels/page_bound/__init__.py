"""Upper bound of q . k over each page, from the page's digest (Quest)."""

from torch import Tensor

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.page_bound import reference
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes


def page_bound(query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor) -> Tensor:
    """query [B, Hq, D], digest [N, H, 2, D] (min, max), page_table [B, P] -> [B, H, P] fp32.

    The largest bound of the query heads that share a KV head; -inf from pages [B] on. Not scaled.
    Raises ValueError on shapes.
    """
    shapes = Shapes(query.device)
    shapes.check("query", query, "B Hq D", FLOATS)
    shapes.check("digest", digest, "N H 2 D", (query.dtype,))
    shapes.check("page_table", page_table, "B P", INDICES)
    shapes.check("pages", pages, "B", INDICES)
    shapes.check_groups()
    if not wants_kernel(query):
        if wants_compiled(query) and digest.stride(2) == query.shape[2]:
            from kvplug_kernels.page_bound import cpu

            return cpu.page_bound(query, digest, page_table, pages)
        return reference.page_bound(query, digest, page_table, pages)
    from kvplug_kernels.page_bound import kernel

    return kernel.page_bound(query, digest, page_table, pages)


__all__ = ["page_bound"]
