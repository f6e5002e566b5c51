"""Which: the pages that each KV head of each query reads, decided on the device."""

from __future__ import annotations

from torch import Tensor

from kvplug.policy import Selector
from kvplug_kernels.page_select import page_select


def choose_pages(
    selector: Selector,
    query: Tensor,
    digest: Tensor | None,
    page_table: Tensor,
    pages: Tensor,
    keep: Tensor,
    *,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Logical pages, ascending, and how many of them count.

    query [B, H, G, D], digest [N, H, rows, D], page_table [B, P], pages [B] valid columns,
    keep [B] at most so many (never above ``width``) -> chosen [B, H, width], counts [B, H] int32.
    The newest page is always among them. Nothing synchronises, so a CUDA graph may capture it.
    """
    if digest is not None:
        query = query.to(digest.dtype)  # of the cache, which need not be the model's
    scores = selector.score(query, digest, page_table, pages)
    if selector.mass is not None:
        scores = scores * scale
    return page_select(
        scores, pages, keep, width, top_p=selector.mass, minimum=min(selector.min_pages, width)
    )
