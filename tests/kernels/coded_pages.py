"""Requests whose pages before the newest are codes; what belongs to nobody is NaN."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvplug_kernels.encode_pages import reference as encode_pages
from kvplug_kernels.page_layout import PageLayout

POISON = 0xFF
"""A byte of NaN in every dtype, and of the highest codes."""
PADDING = 32  # bytes behind each page


@dataclass(frozen=True, kw_only=True)
class CodedPages:
    """Also what was written, of which a test computes what it wants in fp64."""

    layout: PageLayout
    cache: Tensor  # [N, H, page_bytes], a page's and a head's bytes apart from the next one's
    open_keys: Tensor  # [M, S, H, D]
    open_values: Tensor  # [M, S, H, D]
    open_page: Tensor  # [Q]
    page_table: Tensor  # [Q, P], -1 from the newest page on
    lengths: Tensor  # [Q]

    def pools(self) -> tuple[Any, ...]:
        """The arguments of coded_decode up to chosen."""
        return (
            self.cache, self.layout, self.open_keys, self.open_values, self.open_page,
            self.page_table,
        )  # fmt: skip


def empty_pages(N: int, H: int, layout: PageLayout, device: str = "cpu") -> Tensor:
    memory = torch.full((N, H, layout.page_bytes + PADDING), POISON, dtype=torch.uint8)
    return memory.to(device)[:, :, : layout.page_bytes]


def coded_pages(
    lengths: list[int], H: int, layout: PageLayout, device: str = "cpu", seed: int = 0
) -> CodedPages:
    S, D, dtype = layout.page_size, layout.head_size, layout.dtype
    generator = torch.Generator().manual_seed(seed + sum(lengths) + H * D)
    coded = [max(length - 1, 0) // S for length in lengths]
    P, N, M = max(*coded, 0) + 1, sum(coded) + 2, len(lengths) + 2
    cache = empty_pages(N, H, layout)
    free = torch.randperm(N, generator=generator).tolist()
    table = torch.full((len(lengths), P + 3), -1, dtype=torch.int32)
    for q, count in enumerate(coded):
        for p in range(count):
            table[q, p] = n = free.pop()
            drawn = torch.randn(2, 1, S, H, D, generator=generator)
            keys, values = (drawn * (0.5 + torch.rand(D, generator=generator) / 2) + 0.3).to(dtype)
            at = torch.tensor([n])
            encode_pages.encode_pages(layout.views(cache), keys, values, at, layout)
    beside = torch.full((M, 2, H, S, D + 8), float("nan"), dtype=dtype)[..., :D]
    open_page = torch.randperm(M, generator=generator)[: len(lengths)].int()
    for q, length in enumerate(lengths):
        filled = length - coded[q] * S
        written = torch.randn(2, H, filled, D, generator=generator)
        beside[open_page[q].item(), :, :, :filled] = written.to(dtype)
    beside = beside.to(device).transpose(2, 3)
    return CodedPages(
        layout=layout,
        cache=moved(cache, device),
        open_keys=beside[:, 0],
        open_values=beside[:, 1],
        open_page=open_page.to(device),
        page_table=table.to(device)[:, :P],
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def moved(cache: Tensor, device: str) -> Tensor:
    """With the same strides."""
    return torch.as_strided(cache, (*cache.shape[:2], cache.stride(1)), cache.stride()).to(device)[
        :, :, : cache.shape[2]
    ]
