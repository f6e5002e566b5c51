"""XAttention: a block of queries reads the pages that its antidiagonals weigh most.

    l_rc = scale / stride * sum_j q[r stride + stride - 1 - j] . k[c stride + j]        c <= r
    share of page p = mean_r sum_{c in p} softmax(l_r)_c        r: the groups of the block

on groups of ``stride`` positions, each of whose pairs (query, key) lie on one antidiagonal. The
largest pages are read while those before them hold less than ``threshold``.

Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", ICML 2025,
https://arxiv.org/abs/2503.16428

Differs from the paper: query heads that share a KV head read the same pages (mean over the group);
the grid of groups is absolute, so that no chunk's start shifts the antidiagonals; and more than
the first page is always read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from torch import Tensor

from kvplug.generate import BlockSelector, QueryBlocks
from kvplug_kernels.antidiagonal import antidiagonal
from kvplug_kernels.fp8 import FP8


@dataclass(frozen=True, kw_only=True)
class XAttention(BlockSelector):
    name = "xattention"
    reads = "all; a prompt's blocks what holds threshold of their attention"
    paper = "https://arxiv.org/abs/2503.16428"
    needs_keys: ClassVar[bool] = True

    stride: int = 8
    """Positions of a group; the estimate takes 1 / stride of the exact logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stride = self.stride
        whole = isinstance(stride, int) and not isinstance(stride, bool)
        if not whole or stride < 1 or self.block % stride:
            raise ValueError(
                f"xattention: stride must be a number of positions that divides a block of "
                f"{self.block} queries, got {stride!r}; write xattention(stride=8)"
            )

    def check_page(self, page_size: int) -> None:
        super().check_page(page_size)
        if page_size % self.stride:
            raise ValueError(
                f"xattention: stride={self.stride} does not divide a page of {page_size} tokens; "
                f"write xattention(stride={gcd(self.stride, page_size)}), or serve larger pages"
            )

    def score(
        self,
        blocks: QueryBlocks,
        keys: Tensor | None,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
    ) -> Tensor:
        assert keys is not None
        query = blocks.query if keys.dtype in FP8 else blocks.query.to(keys.dtype)
        return antidiagonal(
            query, blocks.bounds, blocks.start, keys, page_table, pages, self.stride, blocks.scale
        )
