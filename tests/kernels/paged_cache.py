"""A paged KV cache in which everything that no request holds is NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 8  # elements after the digest of each page, columns after the page table's


@dataclass(frozen=True)
class PagedCache:
    """A page is [S, H, D] keys, as many values, a digest [H, 2, D], and padding."""

    keys: Tensor  # [N, S, H, D]
    values: Tensor  # [N, S, H, D]
    digest: Tensor  # [N, H, 2, D]
    page_table: Tensor  # [B, P], -1 past the pages of a request
    lengths: Tensor  # [B]

    @property
    def pages(self) -> Tensor:
        S = self.keys.shape[1]
        return (self.lengths + S - 1) // S


def paged_cache(
    lengths: list[int], H: int, D: int, S: int, dtype=torch.float32, device="cpu"
) -> PagedCache:
    """Random keys and values in shuffled pages; the digests are those of the keys."""
    generator = torch.Generator().manual_seed(sum(lengths) + H * D)
    counts = [-(-length // S) for length in lengths]
    P, N = max(*counts, 1), sum(counts) + 3
    memory = torch.full((N, (2 * S + 2) * H * D + PADDING), float("nan"), dtype=dtype)
    rows = memory[:, :-PADDING].view(N, 2 * S + 2, H, D)
    table = torch.full((len(lengths), P + PADDING), -1, dtype=torch.int32)
    free = iter(torch.randperm(N, generator=generator).tolist())
    for b, length in enumerate(lengths):
        for p in range(counts[b]):
            n, filled = next(free), min(S, length - p * S)
            table[b, p] = n
            for row in (0, S):  # keys, then values
                rows[n, row : row + filled] = torch.randn(filled, H, D, generator=generator)
            written = rows[n, :filled].float()
            extremes = torch.stack([written.amin(0), written.amax(0)], 1)
            rows[n, 2 * S :] = extremes.view(2, H, D)
    rows = memory.to(device)[:, :-PADDING].view(N, 2 * S + 2, H, D)
    return PagedCache(
        keys=rows[:, :S],
        values=rows[:, S : 2 * S],
        digest=rows[:, 2 * S :].flatten(1).view(N, H, 2, D),
        page_table=table.to(device)[:, :P],
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def random_query(cache: PagedCache, G: int, dtype: torch.dtype | None = None) -> Tensor:
    """[B, G * H, D] in the cache's dtype unless said, a strided slice as engines pass it."""
    B, H, D = len(cache.lengths), *cache.keys.shape[2:]
    query = torch.randn(B, G * H + 3, D, generator=torch.Generator().manual_seed(B * G))
    return query.to(cache.keys.device, dtype or cache.keys.dtype)[:, : G * H]
