"""Quest: read the pages whose keys could score highest.

    u_p = sum_d max(q_d * lo_pd, q_d * hi_pd)   >=   q . k   for every key k of page p

where lo and hi are the per-channel minimum and maximum of the page's keys. With ``top_p``
a head reads the smallest set of pages whose softmax mass, estimated from the same bounds, reaches
``top_p``, never more than ``budget``.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
ICML 2024, https://arxiv.org/abs/2406.10774

Differs from the paper: query heads that share a KV head read the same pages (maximum over the
group). Bounds are no weights, so ``top_p`` is a rule of thumb here: ``twilight`` estimates them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from torch import Tensor

from kvplug.formats import KeyCodes
from kvplug.load import Selector, check_dense_layers, check_top_p, small_page
from kvplug.policy import Digest
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_digest import update_page_digest
from kvplug_kernels.shapes import by_page


@dataclass(frozen=True)
class KeyExtremes:
    """Per-channel minimum and maximum of a page's keys."""

    accumulates: ClassVar[bool] = True

    def rows(self, page_size: int, itemsize: int) -> int:
        return 2

    def update(self, digest: Tensor, keys: Tensor, slots: Tensor, cached: Tensor) -> None:
        update_page_digest(digest, keys, slots, cached.shape[1] // by_page(digest).shape[1])


@dataclass(frozen=True, kw_only=True)
class Quest(Selector):
    name = "quest"
    reads = "budget, plus a digest of two keys per page"
    paper = "https://arxiv.org/abs/2406.10774"
    min_pages = 3

    top_p: float | None = None
    """Share of the estimated attention mass at which a head stops reading; None reads on."""
    dense_layers: int = 2
    """First layers that read everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_p(self, self.top_p)
        check_dense_layers(self, self.dense_layers)

    @property
    def digest(self) -> Digest:
        return KeyExtremes()

    def over(self, codes: KeyCodes) -> Selector:
        if self.top_p is not None:
            raise ValueError(
                f"{self}: the page that is being filled has no codes yet, and so no bound to "
                "count for top_p; leave top_p out, or use twilight, which weighs pages before it"
            )
        own = {f.name: getattr(self, f.name) for f in fields(Quest) if f.init}
        return QuestOverCodes(**own, codes=codes)

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
        return page_bound(query.flatten(1, 2), digest, page_table, pages)


@dataclass(frozen=True, kw_only=True)
class QuestOverCodes(Quest):
    """Where pages are kept in codes: the same bounds, from lo and the highest code."""

    codes: KeyCodes = field(repr=False)

    @property
    def digest(self) -> Digest:
        return self.codes

    def score(
        self,
        query: Tensor,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
        page_size: int,
    ) -> Tensor:
        """The newest page scores -inf: it has no codes, and is read in any case."""
        assert digest is not None
        full, levels = (pages - 1).clamp(min=0), 2**self.codes.bits - 1
        return page_bound(query.flatten(1, 2), digest[..., :2, :], page_table, full, levels)
