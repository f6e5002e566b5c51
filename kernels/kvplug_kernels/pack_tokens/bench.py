"""python -m kvplug_kernels.pack_tokens.bench"""

import torch

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.pack_tokens import pack_tokens


def case(inputs: DecodeInputs) -> Case:
    """The end of every request's prefill; each head keeps tokens from all over its prompt."""
    shape, keys = inputs.shape, inputs.keys
    B, H, S = shape.B, shape.H, shape.S
    width = shape.kept_pages * S
    prompts, private = B * shape.pages, B * shape.kept_pages
    cache = torch.empty(prompts + private, H, S, 2 * shape.D, device=keys.device, dtype=keys.dtype)
    cache.normal_()
    targets = prompts + torch.randperm(private, device=keys.device).view(B, shape.kept_pages)
    whole = shape.tokens // S * S
    tokens = torch.rand(B, H, whole, device=keys.device).topk(min(width, whole)).indices
    tokens = tokens.sort().values
    keep = torch.full((B,), tokens.shape[2], device=keys.device)
    pages = inputs.page_table.long()
    moved = 2 * tokens.numel() * cache.shape[3] * cache.element_size()
    return Case("pack_tokens", lambda: pack_tokens(cache, pages, tokens, keep, targets), moved)


if __name__ == "__main__":
    print_case(case)
