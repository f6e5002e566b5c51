"""Plain torch, and what a CPU runs: the bound as one matrix product per block of pages.

    sum_d max(q_d * lo_d, q_d * hi_d)  =  min(q, 0) . lo  +  max(q, 0) . hi

so that a query is [negative part | positive part] and a page the row [lo | hi] that it stores.
"""

import torch
from torch import Tensor

# Rows gathered at once. More would not stay in the caches of a core, and past 32 MiB the C library
# returns each buffer to the kernel, whose page faults then cost four times the product itself.
GATHERED_BYTES = 4 << 20


def page_bound(query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor) -> Tensor:
    B, Hq, D = query.shape
    H, P = digest.shape[1], page_table.shape[1]
    signed = query.view(B, H, Hq // H, D)
    signed = torch.cat([signed.clamp(max=0), signed.clamp(min=0)], -1)  # [B, H, G, 2D]
    signed = signed.transpose(2, 3).contiguous()  # [B, H, 2D, G]
    step = max(1, GATHERED_BYTES // (H * 2 * D * digest.element_size()))
    out = torch.full((B, H, P), float("-inf"), device=query.device)
    for b, count in enumerate(pages.tolist()):
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows = digest.index_select(0, page_table[b, start:stop]).flatten(2)  # [p, H, 2D]
            bound = torch.bmm(rows.transpose(0, 1), signed[b])  # [H, p, G]
            out[b, :, start:stop] = bound.amax(2)
    return out


def page_bound_plain(query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor) -> Tensor:
    """The definition, spelled out in fp32."""
    B, Hq, D = query.shape
    H, P = digest.shape[1], page_table.shape[1]
    out = torch.full((B, H, P), float("-inf"), device=query.device)
    q = query.float().view(B, H, Hq // H, 1, D)
    for b in range(B):
        for p in range(int(pages[b])):
            extremes = digest[int(page_table[b, p])].float()  # [H, 2, D]
            out[b, :, p] = (q[b] * extremes[:, None]).amax(2).sum(-1).amax(1)
    return out
