"""What fills the stage generate: which keys a prompt's queries look at.

Axes as in ``kvplug.policy``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvplug.formats import KeyCodes
from kvplug.policy import Action, Digest, Evidence, Granularity, Policy, Positions, Sharing, Stage


@dataclass(frozen=True, kw_only=True)
class SparsePrefill(Policy):
    """Lets a prompt's queries read less than what stands before them, in blocks of queries.

    Blocks end at the multiples of ``block`` of a request's positions, wherever its chunks or a
    cached prefix end. Behind the prompt nothing changes: how decoding reads is another stage's.
    What is read follows from positions, never from the prompt's length, so that equal prefixes are
    equal pages; only the prompt's last queries read more than its length leaves others.
    """

    stage = Stage.GENERATE
    action = Action.VISIBILITY
    granularity = Granularity.PAGE
    memory = "all tokens"

    sinks: int = 128
    """First tokens, which every query reads; rounded up to whole pages."""
    block: int = 64
    """Queries that read the same pages: a multiple of the engine's page, or a part that divides
    it."""
    last: int = 64
    """The prompt's last queries, which read everything: what it asks is mostly there."""

    def __post_init__(self) -> None:
        for field, least in (("sinks", 0), ("block", 1), ("last", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{self.name}: {field} must be a number of tokens, at least {least}, got "
                    f"{value!r}; write {self.name}({field}={getattr(type(self), field)})"
                )

    @property
    def publishes(self) -> Sharing:
        """From the second layer on a prompt's keys are made from what its queries read."""
        return Sharing.OWN

    def check_page(self, page_size: int) -> None:
        """Raises ValueError where an engine's pages of so many tokens do not fit the blocks."""
        if self.block % page_size and page_size % self.block:
            raise ValueError(
                f"{self.name}: a block of {self.block} queries is neither a multiple nor a part "
                f"of a page of {page_size} tokens; write {self.name}(block={page_size})"
            )


@dataclass(frozen=True, kw_only=True)
class PositionalPrefill(SparsePrefill):
    """Reads by position alone, so the host knows every page: all heads and layers read the same.

    A block reads what its first query may, rounded out to whole pages, and its own tokens.
    """

    evidence = Evidence.NONE
    query_agnostic = True

    @abstractmethod
    def first_token(self, positions: Positions) -> Positions:
        """The oldest token that the query at each position reads, beside the sinks.

        Must not decrease with the position. [n] -> [n]
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class LastQueries:
    """The last W queries of each of R prompts, as far as a step has come with them.

    They may stand behind a prompt's last block, among those that read everything.
    """

    query: Tensor
    """Rotated as the keys are. [R, W, H, G, D]"""
    count: Tensor
    """How many of the W, counted from the last, are there; what stands before is any. [R] int32"""
    seen: Tensor
    """Tokens that the last of them sees. [R] int32"""
    block: Tensor
    """The last block of each prompt, whose pages are the ones to look at. [R] int64"""
    run: Tensor
    """The prompt of each block. [n] int64"""


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryBlocks:
    """One layer's blocks of queries, n of them; their rows stand one after the other."""

    query: Tensor
    """Rotated as the keys are. [T, H, G, D]"""
    bounds: Tensor
    """Rows where each block's queries begin, and the last's end. [n + 1] int32"""
    start: Tensor
    """Position of each block's first query among the tokens that it sees. [n] int32"""
    size: int
    """Blocks end at its multiples."""
    scale: float
    """What q . k is multiplied by."""
    last: LastQueries | None = None
    """For a policy that ``asks``."""
    first_head: int = 0
    """As ``PromptKV.first_head``."""


@dataclass(frozen=True, kw_only=True)
class BlockSelector(SparsePrefill):
    """Lets a block of queries read the pages that hold most of its attention, by an estimate.

    One set of pages per KV head and block. The sinks and the block's own pages are always read and
    count; the rest follow by their share, the largest first, while what is read so far holds less
    than ``threshold``, and never more than ``budget`` tokens.
    """

    evidence = Evidence.CURRENT_QUERY
    query_agnostic = False

    needs_keys: ClassVar[bool] = False
    """Whether ``score`` reads the keys themselves."""
    asks: ClassVar[int] = 0
    """How many of a prompt's last queries ``score`` asks beside a block's own. What they answer
    is no function of a block's prefix: what such a policy leaves is for nobody else."""

    threshold: float | None = 0.9
    """Share of a block's estimated attention at which it stops reading; None reads on."""
    budget: int = 16384
    """Tokens read per KV head and block at most, rounded up to whole pages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share, budget = self.threshold, self.budget
        numeric = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and not (numeric and 0 < share <= 1):
            raise ValueError(
                f"{self.name}: threshold must be a share above 0 and at most 1, or None, got "
                f"{share!r}; write {self.name}(threshold=0.9)"
            )
        least = self.sinks + self.block
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < least:
            raise ValueError(
                f"{self.name}: budget must be a number of tokens, at least sinks + block = "
                f"{least}, which are always read, got {budget!r}; raise it, or lower the other two"
            )

    @property
    def publishes(self) -> Sharing:
        return Sharing.NOBODY if self.asks else super().publishes

    @property
    def mass(self) -> float | None:
        """The share of the estimate that ends a selection; None where only the budget does, as
        shares that are rounded may add up to 1 before the last."""
        return None if self.threshold is None or self.threshold == 1 else self.threshold

    @property
    def digest(self) -> Digest | None:
        """What pages must carry for this policy's estimate."""
        return None

    def over(self, codes: KeyCodes) -> BlockSelector:
        """The same over pages that carry codes of their keys for what selects as requests decode:
        choosing by those, where it would else want digests of its own. The last page that a block
        sees may have none yet; it is the block's own."""
        return self

    def page(self, block_size: int) -> int:
        """Tokens of what a digest describes of an engine's block, as ``Selector.page``."""
        return block_size

    def budgets(self, layers: Iterable[int]) -> list[int | float]:
        """As ``Selector.budgets``: all layers read alike."""
        return [self.budget]

    @abstractmethod
    def score(
        self,
        blocks: QueryBlocks,
        keys: Tensor | None,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
    ) -> Tensor:
        """Estimated share of each page in a block's attention. -> [n, H, P] fp32, 0 beyond
        ``pages``; the visible ones' shares sum to 1.

        keys [N, S, H, D] by any strides, as the cache holds them (None unless ``needs_keys``),
        digest [N, H, rows, D] or, where a page is cut into K, [N, K, H, rows, D] (None without
        one), page_table [n, P] int32, pages [n] int32 valid columns, the last of them the page of
        the block's last query. Columns beyond ``pages`` hold stale ids: never read them.
        """
