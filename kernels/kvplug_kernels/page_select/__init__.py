"""The pages that score highest, as ascending indices per KV head; the newest always."""

from torch import Tensor, float32

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.page_select import reference
from kvplug_kernels.shapes import INDICES, Shapes


def page_select(
    scores: Tensor,
    pages: Tensor,
    keep: Tensor,
    width: int,
    top_p: float | None = None,
    minimum: int = 1,
    sinks: int = 0,
    newest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """scores [B, H, P] fp32, pages [B], keep [B] -> chosen [B, H, width], counts [B, H] int32.

    Takes min(keep, pages, width) pages but never fewer than min(minimum, pages): the last newest
    [B] pages, one at least and unless said, the first sinks, then by score, the lower index first
    among equals. With top_p, the fewest of these whose share of softmax(scores), that of the
    newest and of the sinks included, reaches top_p; scores are then scaled logits, or shares'
    logarithms. The first counts entries of chosen ascend and the rest are 0. Raises ValueError on
    shapes and knobs.
    """
    shapes = Shapes(scores.device)
    shapes.check("scores", scores, "B H P", (float32,))
    shapes.check("pages", pages, "B", INDICES)
    shapes.check("keep", keep, "B", INDICES)
    if not 1 <= minimum <= width:
        raise ValueError(f"minimum must be between 1 and width = {width} pages, got {minimum}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0 pages, got {sinks}")
    if newest is not None:
        shapes.check("newest", newest, "B", INDICES)
    if not wants_kernel(scores):
        if wants_compiled(scores) and top_p is None:
            from kvplug_kernels.page_select import cpu

            return cpu.page_select(scores, pages, keep, width, minimum, sinks, newest)
        return reference.page_select(scores, pages, keep, width, top_p, minimum, sinks, newest)
    from kvplug_kernels.page_select import kernel

    return kernel.page_select(scores, pages, keep, width, top_p, minimum, sinks, newest)


__all__ = ["page_select"]
