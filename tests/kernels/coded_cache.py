"""A paged KV cache whose full pages are coded, and in which all that nobody holds is NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug_kernels.code_layout import code_rows
from kvplug_kernels.key_codes import reference

PADDING = 8  # elements behind each page, columns behind the page table's


@dataclass(frozen=True)
class CodedCache:
    """A page is keys, as many values, codes and padding; a head's keys may lie as [D, S]."""

    keys: Tensor  # [N, S, H, D]
    values: Tensor  # [N, S, H, D]
    codes: Tensor  # [N, H, R, D]
    page_table: Tensor  # [B, P], the id of a page of NaN behind a request's pages
    lengths: Tensor  # [B]

    @property
    def full(self) -> Tensor:
        """Full pages before the newest, which a step scores. [B]"""
        return (self.lengths - 1).clamp(min=0) // self.keys.shape[1]


def empty_cache(
    N: int, H: int, D: int, S: int, bits: int, dtype: torch.dtype, device: str, across: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and codes of N pages of NaN; across: a channel's keys lie side by side."""
    R = code_rows(S, bits, dtype.itemsize)
    page = (2 * S + R) * H * D + PADDING
    memory = torch.full((N * page,), float("nan"), dtype=dtype, device=device)
    inner = (1, 2 * S * D, S) if across else (D, 2 * S * D, 1)  # token, head, channel
    keys = memory.as_strided((N, S, H, D), (page, *inner))
    values = memory.as_strided((N, S, H, D), (page, D, 2 * S * D, 1), S * D)
    codes = memory.as_strided((N, H, R, D), (page, R * D, D, 1), 2 * S * H * D)
    return keys, values, codes


def coded_cache(
    lengths: list[int], H: int, D: int, S: int, bits: int,
    dtype=torch.float32, device="cpu", across=False,
) -> CodedCache:  # fmt: skip
    """Random keys and values in shuffled pages."""
    generator = torch.Generator().manual_seed(sum(lengths) + H * D)
    counts = [-(-length // S) for length in lengths]
    P, N = max(*counts, 1), sum(counts) + 3
    keys, values, codes = empty_cache(N, H, D, S, bits, dtype, device, across)
    free = torch.randperm(N, generator=generator).tolist()
    table = torch.full((len(lengths), P + PADDING), free.pop(), dtype=torch.int32)
    ended = []
    for b, length in enumerate(lengths):
        for p in range(counts[b]):
            n, filled = free.pop(), min(S, length - p * S)
            table[b, p] = n
            for pool in (keys, values):
                written = torch.randn(filled, H, D, generator=generator)
                pool[n, :filled] = written.to(pool)
            if filled == S:
                ended.append(n * S + S - 1)
    slots = torch.tensor(ended, dtype=torch.int64, device=device)
    reference.update_key_codes(codes, keys, slots, bits)
    return CodedCache(
        keys=keys,
        values=values,
        codes=codes,
        page_table=table.to(device)[:, :P],
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
    )
