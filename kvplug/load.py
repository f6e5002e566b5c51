"""What fills the stage load: which part of what stayed a decode step reads.

Axes as in ``kvplug.policy``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kvplug.formats import KeyCodes
from kvplug.policy import Action, Digest, Evidence, Granularity, Policy, Positions, Stage


@dataclass(frozen=True, kw_only=True)
class Selector(Policy):
    """Keeps everything and reads the units that score highest for the current query: pages, or
    tokens (``TokenSelector``).

    One set of units per KV head: the query heads that share it read the same ones. The page that
    holds the newest token is always read.
    """

    stage = Stage.LOAD
    action = Action.VISIBILITY
    granularity = Granularity.PAGE
    evidence = Evidence.CURRENT_QUERY
    query_agnostic = False
    memory = "all tokens"

    min_pages: ClassVar[int] = 1

    budget: int | float = 2048
    """Tokens read per KV head, layer and step, rounded up to whole units; as a share of the
    tokens that a query sees where it is a fraction, such as 0.125."""

    def __post_init__(self) -> None:
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if not (whole and self.budget >= 1) and not (
            isinstance(self.budget, float) and 0 < self.budget <= 1
        ):
            raise ValueError(
                f"{self.name}: budget must be a number of tokens, at least 1, or a share of the "
                f"context, above 0 and at most 1.0, got {self.budget!r}; write "
                f"{self.name}(budget=2048) or {self.name}(budget=0.125)"
            )

    @property
    def digest(self) -> Digest | None:
        """What pages must carry for this policy's scores."""
        return None

    def over(self, codes: KeyCodes) -> Selector:
        """The same where pages are kept in a format: choosing by the codes that hold their keys,
        which the page that is being filled has not. Raises ValueError where it cannot."""
        if self.digest is None:
            return self
        raise ValueError(
            f"{self.name} reads digests of its own, which pages that carry codes do not; use "
            "twilight or quest"
        )

    def page(self, block_size: int) -> int:
        """Tokens of a page, to this policy, of an engine's block of so many: the block, or a part
        that divides it (``small_page``). Of K parts digests are then [N, K, H, rows, D]."""
        return block_size

    def unit(self, page_size: int) -> int:
        """Tokens of what is chosen as one."""
        return page_size

    def least(self, page_size: int) -> int:
        """Units that are read in any case, where there are as many."""
        return self.min_pages

    def layer_budget(self, layer: int) -> int | float | None:
        """What this layer may read, as ``budget`` says it; None for all."""
        return self.budget

    def budgets(self, layers: Iterable[int]) -> list[int | float]:
        """The different budgets of those of some layers that select."""
        return sorted({b for b in map(self.layer_budget, layers) if b is not None})

    def units(
        self, visible: Positions, page_size: int, budget: int | float | None = None
    ) -> Positions:
        """Units that a query reads at most of so many tokens that it sees. [n] -> [n]"""
        budget, unit = budget or self.budget, self.unit(page_size)
        tokens = np.ceil(budget * visible) if isinstance(budget, float) else budget
        return np.minimum(
            np.maximum(-(-tokens // unit), self.least(page_size)), -(-visible // unit)
        ).astype(np.int64)

    @property
    def mass(self) -> float | None:
        """Stop early once what is read carries this share of the estimated attention."""
        return None

    @abstractmethod
    def score(
        self,
        query: Tensor,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
        page_size: int,
    ) -> Tensor:
        """Estimated logit of each page, before the softmax scale; higher is read.

        query [B, H, G, D], digest [N, H, rows, D] (None without one), page_table [B, P] int32,
        pages [B] int32 valid columns -> [B, H, P] fp32, -inf beyond ``pages``. Columns beyond
        ``pages`` hold stale ids: skip them, never read and mask.
        """


LARGEST_PAGE = 64
"""Tokens; what is said of more keys together says little of each."""


def small_page(block_size: int) -> int:
    """Tokens of the pages that a block of so many is cut into: hybrid models' have hundreds."""
    if block_size <= LARGEST_PAGE:
        return block_size
    return next((size for size in (32, 16) if block_size % size == 0), block_size)


def check_top_p(policy: Selector, top_p: object) -> None:
    """Raises ValueError unless it is a share, or None."""
    whole = isinstance(top_p, bool) or not isinstance(top_p, (int, float))
    if top_p is not None and (whole or not 0 < top_p <= 1):  # type: ignore[operator]
        raise ValueError(
            f"{policy.name}: top_p must be above 0 and at most 1, got {top_p!r}; "
            f"write {policy.name}(top_p=0.95)"
        )


def check_dense_layers(policy: Selector, layers: object) -> None:
    """Raises ValueError unless it counts layers."""
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 0:
        raise ValueError(
            f"{policy.name}: dense_layers must be a number of layers, got {layers!r}; "
            f"write {policy.name}(dense_layers=2)"
        )


@dataclass(frozen=True, kw_only=True)
class TokenSelector(Selector):
    """Reads the tokens that weigh most by their estimated logits, and the newest page's.

    A token weighs the mean over its KV head's query heads of the softmax over all tokens of the
    pages before the newest.
    """

    granularity = Granularity.TOKEN

    sinks: ClassVar[int] = 4
    """First tokens, which are always read."""

    def unit(self, page_size: int) -> int:
        return 1

    def least(self, page_size: int) -> int:
        return page_size + self.sinks

    @abstractmethod
    def score(
        self,
        query: Tensor,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
        page_size: int,
    ) -> Tensor:
        """Estimated logit of each token of the first ``pages`` pages, which are full.

        As ``Selector.score``, but -> [B, H * G, P * S] fp32, -inf beyond ``pages``.
        """
