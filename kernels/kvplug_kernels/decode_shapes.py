"""Shapes of one decoding step of real models, and random inputs of such a shape."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug_kernels.code_layout import code_rows
from kvplug_kernels.page_layout import PageLayout

KEPT_TOKENS = 2048  # of a request, whatever its length
CODE_BITS = 2  # of a key's channel
PAGE_BITS = 4  # of each number of a page that holds nothing else


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """B requests of the same length, Hq query heads over H KV heads of D channels, pages of S."""

    B: int
    tokens: int
    Hq: int
    H: int
    D: int
    S: int

    @property
    def pages(self) -> int:
        return -(-self.tokens // self.S)

    @property
    def kept_pages(self) -> int:
        return min(self.pages, max(1, KEPT_TOKENS // self.S))


LLAMA_8B = {"Hq": 32, "H": 8, "D": 128}
SMOLLM2_135M = {"Hq": 9, "H": 3, "D": 64}


def serving_shapes() -> Iterator[DecodeShape]:
    """What a report should hold, the most telling first."""
    for heads in (LLAMA_8B, SMOLLM2_135M):
        for S in (16, 32):
            for tokens in (32768, 131072, 8192):
                for B in (1, 4, 16):
                    yield DecodeShape(B=B, tokens=tokens, S=S, **heads)


@dataclass(frozen=True, kw_only=True)
class DecodeInputs:
    """The arguments of every op for one shape; digest and codes are a tail inside each page."""

    shape: DecodeShape
    query: Tensor  # [B, Hq, D]
    keys: Tensor  # [N, S, H, D]
    values: Tensor  # [N, S, H, D]
    digest: Tensor  # [N, H, 2, D]
    codes: Tensor  # [N, H, R, D]
    page_table: Tensor  # [B, P]
    lengths: Tensor  # [B]
    pages: Tensor  # [B]
    keep: Tensor  # [B], pages
    new_keys: Tensor  # [B, H, D], of the token that arrives
    slots: Tensor  # [B]
    scores: Tensor  # [B, H, P]
    chosen: Tensor  # [B, H, K]
    counts: Tensor  # [B, H]


def decode_inputs(shape: DecodeShape, device: str, dtype: torch.dtype) -> DecodeInputs:
    B, H, D, S, P, K = shape.B, shape.H, shape.D, shape.S, shape.pages, shape.kept_pages
    torch.manual_seed(0)
    rows = code_rows(S, CODE_BITS, dtype.itemsize)
    memory = torch.empty(B * P, 2 * S + 2 + rows, H, D, device=device, dtype=dtype).normal_()
    digest = memory[:, 2 * S : 2 * S + 2].view(B * P, H, 2, D)
    digest.copy_(digest.sort(dim=2).values)  # min below max
    page_table = torch.randperm(B * P, device=device).int().view(B, P)
    lengths = torch.full((B,), shape.tokens, device=device, dtype=torch.int32)
    chosen = torch.rand(B, H, P - 1, device=device).topk(K - 1).indices.sort().values
    last = torch.full((B, H, 1), P - 1, device=device)
    return DecodeInputs(
        shape=shape,
        query=torch.randn(B, shape.Hq, D, device=device, dtype=dtype),
        keys=memory[:, :S],
        values=memory[:, S : 2 * S],
        digest=digest,
        codes=memory[:, 2 * S + 2 :].view(B * P, H, rows, D),
        page_table=page_table,
        lengths=lengths,
        pages=torch.full_like(lengths, P),
        keep=torch.full_like(lengths, K),
        new_keys=torch.randn(B, H, D, device=device, dtype=dtype),
        slots=page_table[:, -1].long() * S + (shape.tokens - 1) % S,
        scores=torch.randn(B, H, P, device=device),
        chosen=torch.cat([chosen, last], 2).int(),
        counts=torch.full((B, H), K, device=device, dtype=torch.int32),
    )


def coded_cache(inputs: DecodeInputs, bits: int = PAGE_BITS) -> tuple[Tensor, PageLayout]:
    """As many pages of random codes [N, H, page_bytes]."""
    N, S, H, D = inputs.keys.shape
    layout = PageLayout(
        page_size=S, head_size=D, key_bits=bits, value_bits=bits, dtype=inputs.keys.dtype
    )
    shape = (N, H, layout.page_bytes)
    cache = torch.randint(0, 256, shape, device=inputs.keys.device, dtype=torch.uint8)
    views = layout.views(cache)
    for scales in (views.keys[:, :, :2], views.scales):
        scales.normal_()
    return cache, layout
