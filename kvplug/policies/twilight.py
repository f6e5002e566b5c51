"""Twilight: read the tokens that weigh most by keys in few bits.

    k'_td = lo_pd + step_pd * code_td          codes of ``bits`` bits, per page p and channel d
    w_t   = mean over a KV head's query heads of softmax_t(q . k'_t)

A page carries its keys as codes, made once, when its last token has been written: lo, step and
S * bits / 8 bytes a channel. Of a page of 32 tokens in 16 bits that is 9.4 % of its bytes at two
bits. A KV head reads the ``budget`` tokens that weigh most or, with ``top_p``, the fewest whose
weights reach it. With ``candidates`` only that share of the full pages is scored, those with the
highest bounds on q . k, which lo and step give as in Quest: half the work at a half, without the
answers that a bound does not foresee (on exact recall at 2K a half finds 86 % of the look-ups and
a quarter 57 %, all pages 100 %: ``kvplug eval --suite recall-candidates``).

Lin et al., "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning", 2025,
https://arxiv.org/abs/2502.02770
Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024,
https://arxiv.org/abs/2402.02750
Yang et al., "Post-Training Sparse Attention with Double Sparsity", 2024,
https://arxiv.org/abs/2408.07092

Differs from the papers: Twilight keeps a copy of the keys in four bits, a scale for each token,
and prunes what another method preselects; here two bits, grouped by channel as in KIVI, choose
among all tokens. Query heads that share a KV head read the same tokens. The newest page, which
has no codes yet, and the first four tokens are read always and count towards ``budget``;
``top_p`` is a share of the weight of the tokens before the newest page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvplug.formats import KeyCodes
from kvplug.load import Selector, TokenSelector, check_dense_layers, check_top_p, small_page
from kvplug.policy import Digest
from kvplug_kernels.code_logits import code_logits
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_select import page_select


@dataclass(frozen=True, kw_only=True)
class Twilight(TokenSelector):
    name = "twilight"
    reads = "budget, plus the keys in few bits"
    paper = "https://arxiv.org/abs/2502.02770"

    budget: int | float = 0.0625
    top_p: float | None = None
    """Share of the estimated attention mass at which a head stops reading; None reads on."""
    bits: int = 2
    """Of a key's channel: 1, 2, 4 or 8."""
    dense_layers: int = 2
    """First layers that read everything."""
    candidates: float | None = None
    """Share of the full pages whose tokens are scored, by the pages' bounds; None scores all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_p(self, self.top_p)
        check_dense_layers(self, self.dense_layers)
        if self.bits not in (1, 2, 4, 8) or isinstance(self.bits, bool):
            raise ValueError(
                f"twilight: bits must be 1, 2, 4 or 8, got {self.bits!r}; write twilight(bits=2)"
            )
        share = self.candidates
        if share is not None and not (isinstance(share, float) and 0 < share <= 1):
            raise ValueError(
                f"twilight: candidates must be a share of the pages, above 0 and at most 1.0, got "
                f"{share!r}; write twilight(candidates=0.5)"
            )
        if share is not None and isinstance(self.budget, float) and share < self.budget:
            raise ValueError(
                f"twilight: candidates={share} of the pages hold fewer tokens than "
                f"budget={self.budget} reads; write twilight(budget={self.budget}, "
                f"candidates={min(1.0, 4 * self.budget)})"
            )

    @property
    def digest(self) -> Digest:
        return KeyCodes(self.bits)

    def over(self, codes: KeyCodes) -> Selector:
        return replace(self, bits=codes.bits)

    def page(self, block_size: int) -> int:
        return small_page(block_size)

    def layer_budget(self, layer: int) -> int | float | None:
        return None if layer < self.dense_layers else self.budget

    @property
    def mass(self) -> float | None:
        return self.top_p

    def score(
        self,
        query: Tensor,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
        page_size: int,
    ) -> Tensor:
        assert digest is not None
        query = query.flatten(1, 2)
        wanted = self.candidate_pages(query, digest, page_table, pages)
        return code_logits(query, digest, page_table, pages, page_size, self.bits, wanted)

    def candidate_pages(
        self, query: Tensor, digest: Tensor, page_table: Tensor, pages: Tensor
    ) -> Tensor | None:
        """Whose tokens are scored, by KV head; None for all. query [B, Hq, D] -> [B, H, P] bool"""
        if self.candidates is None:
            return None
        levels = 2**self.bits - 1
        bounds = page_bound(query, digest[..., :2, :], page_table, pages, levels)
        return best_pages(bounds, pages, self.candidates)


def best_pages(bounds: Tensor, pages: Tensor, share: float) -> Tensor:
    """Which of the first ``pages`` score highest, and the last of them. [B, H, P] -> bool"""
    most = max(1, math.ceil(share * bounds.shape[2]))
    keep = (pages * share).ceil().to(pages.dtype)
    chosen, counts = page_select(bounds, pages, keep, most)
    beyond = torch.arange(most, device=bounds.device) >= counts[:, :, None]
    wanted = bounds.new_zeros(*bounds.shape[:2], bounds.shape[2] + 1, dtype=torch.bool)
    places = chosen.masked_fill(beyond, bounds.shape[2]).long()
    return wanted.scatter_(2, places, True)[:, :, :-1].contiguous()
