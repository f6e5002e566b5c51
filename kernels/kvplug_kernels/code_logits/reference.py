"""Plain fp32 torch: a page's steps go into the query, then a product for each place in a byte."""

import torch
from torch import Tensor

from kvplug_kernels.code_layout import packed
from kvplug_kernels.shapes import by_page, rows_of

PAGES = 64  # whose codes are spread out at once


def code_logits(
    query: Tensor,
    codes: Tensor,
    page_table: Tensor,
    pages: Tensor,
    page_size: int,
    bits: int,
    wanted: Tensor | None = None,
) -> Tensor:
    B, Hq, D = query.shape
    codes = by_page(codes)
    H, P = codes.shape[2], page_table.shape[1] * codes.shape[1]
    q = query.float().view(B, H, Hq // H, D)
    spread = packed(codes, page_size, bits)  # [N, K, H, J, D]
    out = query.new_full((B, H, Hq // H, P, page_size), float("-inf"), dtype=torch.float32)
    for b, count in enumerate(pages.tolist()):
        for start in range(0, count, PAGES):
            stop = min(start + PAGES, count)
            lo, step = rows_of(codes[..., :2, :], page_table[b], start, stop).float().unbind(2)
            joined = rows_of(spread, page_table[b], start, stop)  # [p, H, J, D]
            weights = q[b] * step[:, :, None]  # [p, H, G, D]
            base = q[b] @ lo[..., None]  # [p, H, G, 1]
            shares = [
                weights @ (joined >> place & 2**bits - 1).float().transpose(2, 3)
                for place in range(0, 8, bits)
            ]  # of [p, H, G, J]
            out[b, :, :, start:stop] = (base + torch.cat(shares, 3)).permute(1, 2, 0, 3)
    if wanted is not None:
        out.masked_fill_(~wanted[:, :, None, :, None], float("-inf"))
    return out.view(B, Hq, P * page_size)
