"""Which: the units that each KV head of each query reads, decided on the device."""

from __future__ import annotations

from torch import Tensor

from kvplug.policy import Selector, TokenSelector
from kvplug_kernels.page_select import page_select
from kvplug_kernels.token_select import token_select


def choose_units(
    selector: Selector,
    query: Tensor,
    digest: Tensor | None,
    page_table: Tensor,
    pages: Tensor,
    lengths: Tensor,
    keep: Tensor,
    *,
    page_size: int,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Logical units of ``selector.unit(page_size)`` tokens, ascending, and how many count.

    query [B, H, G, D], digest [N, H, rows, D], page_table [B, P], pages [B] valid columns, lengths
    [B] tokens in them, keep [B] at most so many (never above ``width``) -> chosen [B, H, width],
    counts [B, H] int32. The newest page is always among them. Nothing synchronises, so a CUDA
    graph may capture it.
    """
    if digest is not None:
        query = query.to(digest.dtype)  # of the cache, which need not be the model's
    if isinstance(selector, TokenSelector):
        full = (lengths.clamp(min=1) - 1) // page_size
        logits = selector.score(query, digest, page_table, full, page_size)
        # A table that no step is wide enough for still names what each query must read.
        most = max(width, selector.least(page_size))
        chosen, counts = token_select(
            logits, query.shape[1], lengths, page_size, keep, most, scale,
            top_p=selector.mass, sinks=selector.sinks,
        )  # fmt: skip
        return chosen[:, :, :width], counts
    scores = selector.score(query, digest, page_table, pages, page_size)
    if selector.mass is not None:
        scores = scores * scale
    return page_select(
        scores, pages, keep, width, top_p=selector.mass, minimum=min(selector.min_pages, width)
    )
