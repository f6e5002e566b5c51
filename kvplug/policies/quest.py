"""Quest: read the pages whose keys could score highest.

    u_p = sum_d max(q_d * lo_pd, q_d * hi_pd)   >=   q . k   for every key k of page p

where lo and hi are the per-channel minimum and maximum of the page's keys. With ``top_p``
(Twilight) a head reads the smallest set of pages whose softmax mass, estimated from the same
bounds, reaches ``top_p``, never more than ``budget``.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
ICML 2024, https://arxiv.org/abs/2406.10774
Lin et al., "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning", 2025,
https://arxiv.org/abs/2502.02770

Differs from the papers: query heads that share a KV head read the same pages (maximum over the
group); Twilight prunes tokens by quantised keys, we prune pages by their bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvplug.policy import Digest, Selector
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_digest import update_page_digest


class KeyExtremes:
    """Per-channel minimum and maximum of a page's keys."""

    rows = 2

    def update(self, digest: Tensor, keys: Tensor, slots: Tensor, page_size: int) -> None:
        update_page_digest(digest, keys, slots, page_size)


@dataclass(frozen=True, kw_only=True)
class Quest(Selector):
    name = "quest"
    reads = "budget, plus a digest of two keys per page"
    paper = "https://arxiv.org/abs/2406.10774"
    digest: ClassVar[Digest] = KeyExtremes()
    min_pages = 3

    top_p: float | None = None
    """Share of the estimated attention mass at which a head stops reading; None reads on."""
    dense_layers: int = 2
    """First layers that read everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p is not None and not (
            isinstance(self.top_p, (int, float)) and self.top_p is not True and 0 < self.top_p <= 1
        ):
            raise ValueError(
                f"quest: top_p must be above 0 and at most 1, got {self.top_p!r}; "
                "write quest(budget=2048, top_p=0.95)"
            )
        if (
            isinstance(self.dense_layers, bool)
            or not isinstance(self.dense_layers, int)
            or self.dense_layers < 0
        ):
            raise ValueError(
                f"quest: dense_layers must be a number of layers, got {self.dense_layers!r}; "
                "write quest(dense_layers=2)"
            )

    def layer_budget(self, layer: int) -> int | None:
        return None if layer < self.dense_layers else self.budget

    @property
    def mass(self) -> float | None:
        return self.top_p

    def score(
        self, query: Tensor, digest: Tensor | None, page_table: Tensor, pages: Tensor
    ) -> Tensor:
        assert digest is not None
        return page_bound(query.flatten(1, 2), digest, page_table, pages)
