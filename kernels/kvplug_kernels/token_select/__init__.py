"""The tokens that weigh most by estimated logits, as ascending indices per KV head."""

from torch import Tensor, float32

from kvplug_kernels.dispatch import wants_compiled, wants_kernel
from kvplug_kernels.shapes import INDICES, Shapes, check_page_size
from kvplug_kernels.token_select import reference


def token_select(
    logits: Tensor,
    heads: int,
    lengths: Tensor,
    page_size: int,
    keep: Tensor,
    width: int,
    scale: float,
    top_p: float | None = None,
    sinks: int = 0,
) -> tuple[Tensor, Tensor]:
    """logits [B, Hq, T] fp32, lengths [B], keep [B] -> chosen [B, H, width], counts [B, H] int32.

    The lengths tokens of a request are the scored ones, those of its pages before the newest, and
    the newest page's, behind which logits are not read. A scored token weighs the mean over the
    query heads of its KV head of softmax(scale * logits) over the scored ones; NaN counts as -inf.
    Taken are the newest page's tokens and the first sinks, then by weight, the lower index first
    among equals, up to min(keep, width) in all but never fewer than min(lengths, S + sinks). With
    top_p, the fewest of these whose scored ones, sinks included, have top_p of the weight. The
    first counts entries of chosen ascend and the rest are 0. heads: H. Raises ValueError on shapes
    and knobs.
    """
    shapes = Shapes(logits.device)
    shapes.lengths["H"] = heads
    shapes.check("logits", logits, "B Hq T", (float32,))
    shapes.check("lengths", lengths, "B", INDICES)
    shapes.check("keep", keep, "B", INDICES)
    shapes.check_groups()
    check_page_size(page_size)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0 tokens, got {sinks}")
    if width < page_size + sinks:
        raise ValueError(
            f"width must be at least page_size + sinks = {page_size + sinks} tokens, got {width}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    arguments = (logits, heads, lengths, page_size, keep, width, scale, top_p, sinks)
    if not wants_kernel(logits):
        if wants_compiled(logits):
            from kvplug_kernels.token_select import cpu

            return cpu.token_select(*arguments)
        return reference.token_select(*arguments)
    from kvplug_kernels.token_select import kernel

    return kernel.token_select(*arguments)


__all__ = ["token_select"]
