"""Upper bound of q . k over each page, from the least and greatest key of each channel (Quest)."""

from torch import Tensor

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.page_bound import reference
from kvplug_kernels.shapes import FLOATS, INDICES, Shapes, by_page


def page_bound(
    query: Tensor,
    digest: Tensor,
    page_table: Tensor,
    pages: Tensor,
    levels: int | None = None,
) -> Tensor:
    """query [B, Hq, D], digest [N, H, 2, D] (min, max), page_table [B, P] -> [B, H, P] fp32.

    The largest bound of the query heads that share a KV head; -inf from pages [B] on. Not scaled.
    Where a block of the table is K pages, digest is [N, K, H, 2, D] and the result [B, H, P * K].
    With levels the digest is (min, step) and the greatest key min + levels * step, step at least
    0. The digest has the query's dtype or eight bits. Raises ValueError on shapes and levels.
    """
    if levels is not None and levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    digest, shapes = by_page(digest), Shapes(query.device)
    shapes.check("query", query, "B Hq D", FLOATS)
    shapes.check("digest", digest, "N K H 2 D", (query.dtype, *FP8))
    shapes.check("page_table", page_table, "B P", INDICES)
    shapes.check("pages", pages, "B", INDICES)
    shapes.check_groups()
    if not wants_kernel(query):
        if wants_compiled(query) and digest.stride(3) == query.shape[2]:
            from kvplug_kernels.page_bound import cpu

            return cpu.page_bound(query, digest, page_table, pages, levels)
        return reference.page_bound(query, digest, page_table, pages, levels)
    from kvplug_kernels.page_bound import kernel

    return kernel.page_bound(query, digest, page_table, pages, levels)


__all__ = ["page_bound"]
