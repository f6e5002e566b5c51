"""The tokens that each KV head keeps of a prompt, copied side by side into pages of their own."""

import torch
from torch import Tensor

from kvplug_kernels.dispatch import wants_kernel
from kvplug_kernels.fp8 import FP8
from kvplug_kernels.pack_tokens import reference
from kvplug_kernels.shapes import FLOATS, Shapes

INTEGERS = (torch.int64, torch.int32)


def pack_tokens(
    cache: Tensor, pages: Tensor, tokens: Tensor, keep: Tensor, targets: Tensor
) -> None:
    """cache [N, H, S, C] copies, within KV head h, token tokens[j, h, k] of prompt j to place k.

    pages [J, P] are the prompt's pages in order, targets [J, Kp] those that receive: token t lies
    at offset t % S of page pages[j, t // S], place k at offset k % S of page targets[j, k // S].
    Of tokens [J, H, K] the first keep[j] of a row count. What stands past them is not followed,
    nor are the columns of pages and targets that they do not name. Prompts may share pages; a page
    that receives is no prompt's own and receives from one prompt alone. Raises ValueError on
    shapes.
    """
    shapes = Shapes(cache.device)
    shapes.check("cache", cache, "N H S C", (*FLOATS, *FP8))
    shapes.check("pages", pages, "J P", INTEGERS)
    shapes.check("tokens", tokens, "J H K", INTEGERS)
    shapes.check("keep", keep, "J", INTEGERS)
    shapes.check("targets", targets, "J Kp", INTEGERS)
    room = shapes["Kp"] * shapes["S"]
    if room < shapes["K"]:
        raise ValueError(
            f"targets must have room for the {shapes['K']} tokens of a head, got {shapes['Kp']} "
            f"pages of {shapes['S']}"
        )
    if not wants_kernel(cache):
        return reference.pack_tokens(cache, pages, tokens, keep, targets)
    from kvplug_kernels.pack_tokens import kernel

    kernel.pack_tokens(cache, pages, tokens, keep, targets)


__all__ = ["pack_tokens"]
