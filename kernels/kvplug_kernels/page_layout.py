"""How a page of codes lies in bytes, per KV head: keys per channel, values per token (KIVI).

    keys     as ``code_layout`` says: lo and step [D] in dtype, S * key_bits / 8 rows of D bytes
    values   S rows of V = D * value_bits / 8 bytes, each of one token: byte j holds the channels
             j + i * V, i below 8 / value_bits, each at bit i * value_bits
    scales   S rows of lo, then step, of each group of a token's channels, in dtype

A channel is about lo + step * code. Each part begins at a multiple of 16 bytes.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024,
https://arxiv.org/abs/2402.02750
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvplug_kernels.code_layout import code_bytes, code_rows
from kvplug_kernels.shapes import FLOATS

ALIGNED = 16  # bytes
GROUP = {1: 32, 2: 32, 4: 64, 8: 64}
"""Channels of a value that share lo and step, at most, by bits."""

Coded = Tensor | tuple[Tensor, Tensor]
"""A pool of pages' bytes [N, H, page_bytes] uint8, or one of keys' and one of values' bytes."""


class Views(NamedTuple):
    """The same memory by what lies in it; strides before a head's own are the pool's."""

    keys: Tensor  # [N, H, R, D], as code_logits takes it
    values: Tensor  # [N, H, S, D * value_bits / 8] uint8
    scales: Tensor  # [N, H, S, 2, D / group]


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Of pages of so many tokens. group: channels of a value that share lo and step, the greatest
    divisor of head_size up to ``GROUP`` unless said; dtype: of what is coded, lo and step.

    Raises ValueError where codes would not fill their bytes, and on all else that it cannot lay.
    """

    page_size: int
    head_size: int
    key_bits: int
    value_bits: int
    dtype: torch.dtype
    group: int = 0

    def __post_init__(self) -> None:
        code_bytes(self.page_size, self.key_bits)
        if self.value_bits not in GROUP:
            raise ValueError(f"value_bits must be 1, 2, 4 or 8, got {self.value_bits}")
        if self.head_size < 1 or self.head_size % (8 // self.value_bits):
            raise ValueError(
                f"head_size must be a multiple of {8 // self.value_bits} channels, which share a "
                f"byte at {self.value_bits} bits, got {self.head_size}"
            )
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {self.dtype}")
        if not self.group:
            fits = (n for n in range(GROUP[self.value_bits], 0, -1) if self.head_size % n == 0)
            object.__setattr__(self, "group", next(fits))
        if self.group < 1 or self.head_size % self.group:
            raise ValueError(
                f"group must divide the {self.head_size} channels of a head, got {self.group}"
            )

    @property
    def groups(self) -> int:
        """Of a value's channels."""
        return self.head_size // self.group

    @property
    def value_row(self) -> int:
        """Bytes of the codes of one value."""
        return self.head_size * self.value_bits // 8

    @property
    def key_rows(self) -> int:
        """R, as ``code_rows`` has it."""
        return code_rows(self.page_size, self.key_bits, self.dtype.itemsize)

    @property
    def key_bytes(self) -> int:
        return aligned(self.key_rows * self.head_size * self.dtype.itemsize)

    @property
    def value_bytes(self) -> int:
        """Of values and scales."""
        scales = self.page_size * 2 * self.groups * self.dtype.itemsize
        return aligned(self.page_size * self.value_row) + aligned(scales)

    @property
    def page_bytes(self) -> int:
        """Of one KV head's page, a multiple of 16."""
        return self.key_bytes + self.value_bytes

    @property
    def plain_bytes(self) -> int:
        """Of the same page in dtype."""
        return 2 * self.page_size * self.head_size * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Of a token's share of a KV head's page, rounded up."""
        return -(-self.page_bytes // self.page_size)

    @property
    def plain_tokens(self) -> int:
        """Tokens in dtype that as many bytes hold as a page of codes, in whole bytes a token."""
        return self.token_bytes * self.page_size * self.page_size // self.plain_bytes

    @property
    def plain_pages(self) -> int:
        """Pages of codes whose bytes hold the page before it is coded."""
        return -(-self.page_size // self.plain_tokens)

    def constants(self) -> dict[str, int]:
        """As Triton's kernels name them."""
        return {
            "D": self.head_size,
            "S": self.page_size,
            "J": code_bytes(self.page_size, self.key_bits),
            "KEY_BITS": self.key_bits,
            "V": self.value_row,
            "GROUP": self.group,
            "VALUE_BITS": self.value_bits,
        }

    def keys(self, cache: Coded) -> Tensor:
        """cache [N, H, page_bytes], or the keys' [N, H, key_bytes] of a pair -> [N, H, R, D]."""
        if isinstance(cache, tuple):
            section = checked("the keys' cache", cache[0], self.key_bytes)
        else:
            section = checked("cache", cache, self.page_bytes)[..., : self.key_bytes]
        rows, D = self.key_rows, self.head_size
        return self.typed(section)[..., : rows * D].unflatten(-1, (rows, D))

    def values(self, cache: Coded) -> tuple[Tensor, Tensor]:
        """Their codes [N, H, S, D * value_bits / 8] uint8 and scales [N, H, S, 2, D / group]."""
        if isinstance(cache, tuple):
            section = checked("the values' cache", cache[1], self.value_bytes)
        else:
            section = checked("cache", cache, self.page_bytes)[..., self.key_bytes :]
        codes = section[..., : self.page_size * self.value_row]
        scales = self.typed(section[..., aligned(codes.shape[-1]) :])
        scales = scales[..., : self.page_size * 2 * self.groups]
        return (
            codes.unflatten(-1, (self.page_size, self.value_row)),
            scales.unflatten(-1, (self.page_size, 2, self.groups)),
        )

    def views(self, cache: Coded) -> Views:
        """Raises ValueError unless cache is uint8 of so many bytes, side by side, that lie as
        elements of dtype may."""
        return Views(self.keys(cache), *self.values(cache))

    def typed(self, section: Tensor) -> Tensor:
        places = (*section.stride()[:-1], section.storage_offset())
        if any(place % self.dtype.itemsize for place in places):
            raise ValueError(
                f"pages and heads must begin at multiples of {self.dtype.itemsize} bytes, "
                f"got strides {list(section.stride())} from byte {section.storage_offset()} on"
            )
        return section.view(self.dtype)


def aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def checked(name: str, cache: Tensor, count: int) -> Tensor:
    if cache.ndim != 3 or cache.dtype != torch.uint8 or cache.shape[2] != count:
        raise ValueError(
            f"{name} must be [N, H, {count}] uint8, got {list(cache.shape)} {cache.dtype}"
        )
    if count > 1 and cache.stride(2) != 1:
        raise ValueError(
            f"{name} must have a head's bytes side by side, got strides {list(cache.stride())}"
        )
    return cache
