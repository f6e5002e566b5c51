"""KIVI: keys in few bits per channel, values in few bits per token.

    k'_td = lo_pd + step_pd * code_td          page p, channel d
    v'_td = lo_tg + step_tg * code_td          token t, group g of channels

A key's channels differ in size by orders, and each is alike from token to token; a value's are
not. So a page's keys are coded channel by channel over its tokens, its values token by token over
groups of 64 channels, 32 at two bits. Of a head of 64 in 16 bits that is 3.4 times as many tokens
at four bits and 5.3 times at two. The page that is being filled stays as it was
(``kvplug.formats``). A model's ``first`` layers may have other bits; what selects leaves those
alone, as ``dense_layers`` says.

On answers of SmolLM2 four bits lose .011 nats a token over dense and two .31, more than ``random``
with a third of the tokens. Exact recall finds every look-up at four, with ``twilight`` too, and 96
of 100 at two, where ``snapkv`` finds 42 by the bytes of four (docs/evidence.md, "Time and
memory").

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024,
https://arxiv.org/abs/2402.02750

Differs from the paper: a page of the engine's is the group of a key's channel, so that it is coded
alone, shared and freed with the engine's block; no more of a request's recent tokens stays plain
than its newest page, and a prompt's own queries see the codes too, as a later request with the
same prefix does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvplug.formats import KeyCodes, PageFormat
from kvplug_kernels.page_layout import PageLayout

BITS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Kivi(PageFormat):
    name = "kivi"
    memory = "all tokens, in few bits"
    reads = "all tokens, in few bits"
    paper = "https://arxiv.org/abs/2402.02750"

    bits: int = 4
    """Of a key's channel: 2, 4 or 8."""
    value_bits: int | None = None
    """Of a value's, where they differ."""
    first: int | None = None
    """Of the model's layers, so many at its beginning have other bits."""
    bits_first: int | None = None
    """Theirs, of keys and values."""

    def __post_init__(self) -> None:
        for name in ("bits", "value_bits", "bits_first"):
            value = getattr(self, name)
            if name != "bits" and value is None:
                continue
            if isinstance(value, bool) or value not in BITS:
                also = f"first={self.first}, " if name == "bits_first" else ""
                raise ValueError(
                    f"kivi: {name} must be 2, 4 or 8, got {value!r}; write kivi({also}{name}=4)"
                )
        first = self.first
        if (first is None) != (self.bits_first is None):
            raise ValueError(
                f"kivi: first and bits_first go together, got first={first}, "
                f"bits_first={self.bits_first}; write kivi(bits=2, first=2, bits_first=4)"
            )
        if first is not None and (isinstance(first, bool) or type(first) is not int or first < 1):
            raise ValueError(
                f"kivi: first must be a number of layers, at least 1, got {first!r}; write "
                f"kivi(bits={self.bits}, first=2, bits_first={self.bits_first})"
            )

    @property
    def codes(self) -> KeyCodes:
        return KeyCodes(self.bits)

    @property
    def apart(self) -> int:
        return self.first or 0

    def in_layer(self, layer: int) -> Kivi:
        if self.first is None:
            return self
        if layer < self.first:
            assert self.bits_first is not None
            return Kivi(bits=self.bits_first)
        return replace(self, first=None, bits_first=None)

    def layout(self, page_size: int, head_size: int, dtype: torch.dtype) -> PageLayout:
        assert self.first is None, "layers differ"
        if page_size not in (32, 64):
            raise ValueError(
                f"{self} codes pages of 32 or 64 tokens, got blocks of {page_size}; write "
                "--block-size 32"
            )
        return PageLayout(
            page_size=page_size, head_size=head_size, key_bits=self.bits,
            value_bits=self.value_bits or self.bits, dtype=dtype,
        )  # fmt: skip
