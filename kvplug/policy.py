"""What a policy is: one answer to one question in the life of a KV cache.

    generate   which keys a prompt's queries look at          (sparse prefill)
    compress   which tokens stay, in how many bits            (eviction, quantisation)
    reuse      what of it another request may take            (prefix, blended chunks)
    load       which part of what stayed a step reads         (selection)

The stages are those of SCBench (Li et al., ICLR 2025, https://arxiv.org/abs/2412.10319).
A policy class declares what it does to state, at which granularity and on which evidence; the
core derives from the declaration what is legal (``kvplug.composition``).

How many pages or tokens is decided on the host, from lengths and the policy alone, so that
schedulers, workers and tensor-parallel ranks agree without talking. Which ones is decided on
the device.

Axes: B requests, T cached tokens, W window queries, P pages, S tokens per page, N physical pages,
Hq query heads, H KV heads, G = Hq / H, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import chain
from math import ceil
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Positions = NDArray[np.int64]
LIMIT = 1 << 62
"""What every whole number of a user's stays below: NumPy and torch hold it, and sums of a few."""


class Stage(Enum):
    GENERATE = "generate"
    COMPRESS = "compress"
    REUSE = "reuse"
    LOAD = "load"


class Action(Enum):
    """What a policy does to state (the terms of SGLang's RFC #32657)."""

    VISIBILITY = "visibility"  # read less, keep all
    EVICTION = "eviction"  # keep less
    PLACEMENT = "placement"  # keep it elsewhere or smaller


class Granularity(Enum):
    PAGE = "page"
    TOKEN = "token"
    HEAD = "head"
    LAYER = "layer"


class Evidence(Enum):
    """What a policy looks at before it decides."""

    NONE = "none"
    KEYS = "keys"
    KEYS_AND_VALUES = "keys and values"
    WINDOW_QUERIES = "window queries"
    CURRENT_QUERY = "current query"


class Sharing(Enum):
    """Whom the pages that requests leave in the cache may serve."""

    PLAIN = "plain"  # anyone: they are what their tokens alone make them
    OWN = "own"  # whoever has the same policy
    NOBODY = "nobody"


class Digest(Protocol):
    """What a page says of its keys without being read. Equal digests are the same bytes.

    It lies in the cache's dtype behind the page's tokens, so that it moves, is shared and is
    freed with the page: ``rows`` vectors of D for each KV head.
    """

    @property
    def accumulates(self) -> bool:
        """Whether it grows by each key, and lets go of one only when its page begins anew; if not,
        a page's last key makes it, from the keys that lie there then."""

    def rows(self, page_size: int, itemsize: int) -> int:
        """Of elements of so many bytes. Raises ValueError for pages that it cannot describe."""

    def update(self, digest: Tensor, keys: Tensor, slots: Tensor, cached: Tensor) -> None:
        """Account for new keys, in place.

        digest [N, H, rows, D], slots [tokens] int64 (page * S + offset; negative for padding),
        cached [N, S, H, D]: the cache in which the new keys lie already, by any strides, keys
        [tokens, H, D]: those, in its dtype. The tokens of one page arrive adjacent and ascending.
        Where a policy cuts blocks into K pages, digest is [N, K, H, rows, D] and cached
        [N, K * S, H, D].
        """


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """One method: a frozen dataclass whose fields are the paper's knobs."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    action: ClassVar[Action]
    granularity: ClassVar[Granularity]
    evidence: ClassVar[Evidence]
    query_agnostic: ClassVar[bool]
    """Whether what is kept does not depend on the question, so that others may reuse it."""
    memory: ClassVar[str]
    """Cached tokens per request, in words."""
    reads: ClassVar[str]
    """Tokens that a decode step reads, in words."""
    paper: ClassVar[str]

    def __str__(self) -> str:
        """The line that parses back to this policy."""
        options = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.init]
        wrapped = [str(value) for _, value, _ in options if isinstance(value, Policy)]
        shown = [
            f"{name}={value!r}"
            for name, value, default in options
            if not isinstance(value, Policy) and not (value is None and default is None)
        ]
        inside = ", ".join(wrapped + shown)
        return f"{self.name}({inside})" if inside else self.name

    @property
    def parts(self) -> list[Policy]:
        """The policy and those that it wraps."""
        values = [getattr(self, f.name) for f in fields(self)]
        wrapped = [value.parts for value in values if isinstance(value, Policy)]
        return [self, *chain.from_iterable(wrapped)]

    @property
    def publishes(self) -> Sharing:
        """Whom what the policy leaves in the cache may serve."""
        if self.action is not Action.EVICTION:
            return Sharing.PLAIN
        return Sharing.OWN if self.query_agnostic else Sharing.NOBODY


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
    def mass(self) -> float | None:
        """The share of the estimate that ends a selection; None where only the budget does, as
        shares that are rounded may add up to 1 before the last."""
        return None if self.threshold is None or self.threshold == 1 else self.threshold

    @property
    def digest(self) -> Digest | None:
        """What pages must carry for this policy's estimate."""
        return None

    def page(self, block_size: int) -> int:
        """Tokens of what a digest describes of an engine's block, as ``Selector.page``."""
        return block_size

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


@dataclass(frozen=True, kw_only=True)
class PositionalEviction(Policy):
    """Keeps tokens by position alone, so the host knows every page that goes, during prefill too.

    Visibility is rounded out to whole pages: a page is seen until its last token has left.
    """

    stage = Stage.COMPRESS
    action = Action.EVICTION
    granularity = Granularity.PAGE
    evidence = Evidence.NONE
    query_agnostic = True

    @abstractmethod
    def kept_from_start(self) -> int:
        """Tokens at the start of a request that always stay."""

    @abstractmethod
    def first_token(self, positions: Positions) -> Positions:
        """The oldest token that the query at each position still sees, beside the start.

        Must not decrease with the position. [n] -> [n]
        """

    @abstractmethod
    def most_tokens(self) -> int:
        """The most tokens one query sees: what a request holds between steps."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptKV:
    """One layer of a few prompts whose prefill has ended, copied out of the cache.

    In the cache's dtype; a score is asked of bfloat16 where that has eight bits. Those are the
    numbers as they lie: what an engine multiplies a layer's keys by is in ``scale``, and as much
    for all of them, as is what it multiplies its values by. What stands beyond a prompt's length
    is garbage, NaN included.
    """

    keys: Tensor
    """[B, T, H, D]"""
    values: Tensor
    """[B, T, H, D]"""
    queries: Tensor | None
    """The last W queries of each prompt, rotated as the keys are; None if the policy needs none.

    [B, W, H, G, D]. The last row is the prompt's last token; a prompt shorter than W leaves its
    first rows to garbage.
    """
    lengths: Tensor
    """Tokens of each prompt, those of its partial last page included. [B] int"""
    scale: float
    """What q . k is multiplied by."""
    first_head: int = 0
    """Global index of head 0, so that tensor-parallel ranks tell their heads apart."""
    page_size: int
    event: int = 0
    """How often the request was packed before: behind the first time, what is scored are the
    tokens that were kept, in order, and those that came since."""

    @property
    def valid(self) -> Tensor:
        """Which tokens are no garbage. [B, T] bool"""
        positions = torch.arange(self.keys.shape[1], device=self.keys.device)
        return positions < self.lengths[:, None]


@dataclass(frozen=True, kw_only=True)
class ScoredEviction(Policy):
    """Keeps the tokens of a prompt that score highest, once, when its prefill has ended; with an
    ``interval`` those of an answer too, every so many tokens; with a ``chunk`` those of prompt and
    answer as they come.

    Each KV head of a layer keeps its own ``budget`` tokens of the prompt's whole pages. The
    prompt's partial last page and what is decoded later stay, until the next time.
    """

    stage = Stage.COMPRESS
    action = Action.EVICTION
    granularity = Granularity.TOKEN
    memory = "budget, plus the answer or interval of it"
    reads = "budget, plus the answer or interval of it"

    budget: int | float = 1024
    """Tokens kept per KV head and layer, rounded up to whole pages; as a share of each ``chunk``
    where it is a fraction, such as 0.25: what is kept of a chunk then stays as it is, a function
    of the tokens up to its end."""
    sinks: int = 4
    """First tokens of a prompt that are always kept."""
    window: int = 0
    """Last tokens of a prompt that are always kept, and whose queries the score may ask for."""
    interval: int | None = None
    """Tokens of an answer between two times that what is kept is chosen anew, from what was kept
    and those tokens; rounded up to whole pages. None keeps the whole answer."""
    chunk: int | None = None
    """Tokens of prompt and answer between two such times, from where the first ``budget + chunk``
    end: later queries, the rest of the prompt's too, see what was kept, and the cache never holds
    more. For scores by keys and values alone. None waits for the prompt's end."""

    def __post_init__(self) -> None:
        for name in ("interval", "chunk"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value < LIMIT):
                raise ValueError(
                    f"{self.name}: {name} must be a number of tokens, at least 1, or None, got "
                    f"{value!r}; write {self.name}({name}=128)"
                )
        if self.chunk is not None and self.needs_queries:
            raise ValueError(
                f"{self.name}: chunk packs a prompt before its last tokens are there, whose "
                f"queries {self.name} scores by; leave chunk out, or use keydiff(chunk="
                f"{self.chunk})"
            )
        if self.chunk is not None and self.interval is not None:
            raise ValueError(
                f"{self.name}: chunk={self.chunk} packs answers too, as they come; leave "
                "interval out"
            )
        self._check_share()
        counts = [("sinks", 0), ("window", int(self.needs_queries))]
        for field, least in counts if self.appends else [("budget", 1), *counts]:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{self.name}: {field} must be a number of tokens, at least {least}, got "
                    f"{value!r}; write {self.name}({field}={getattr(type(self), field)})"
                )
        kept = int(self.budget * self.chunk) if self.appends and self.chunk else self.budget
        if kept < self.sinks + self.window:
            raise ValueError(
                f"{self.name}: budget must be at least sinks + window = "
                f"{self.sinks + self.window} tokens, got {kept}; raise the budget or lower "
                "the other two"
            )
        if self.needs_queries and self.interval is not None and self.interval < self.window:
            raise ValueError(
                f"{self.name}: interval must be at least window = {self.window} tokens, whose "
                f"queries score what came since, got {self.interval}; raise it or lower the window"
            )

    def _check_share(self) -> None:
        if not self.appends:
            return
        if not 0 < self.budget < 1:
            raise ValueError(
                f"{self.name}: budget must be a number of tokens, at least 1, or a share of each "
                f"chunk, above 0 and below 1, got {self.budget!r}; write {self.name}(budget=1024) "
                f"or {self.name}(budget=0.25, chunk=512)"
            )
        if self.chunk is None:
            share = (
                "" if self.needs_queries else f"(budget={self.budget}, chunk=512) or {self.name}"
            )
            raise ValueError(
                f"{self.name}: budget must be a number of tokens, got {self.budget}, a share of "
                f"what is not known beforehand; write {self.name}{share}(budget=1024)"
            )

    @property
    def appends(self) -> bool:
        """Whether what is kept of a chunk is never chosen from again: a context grows by it."""
        return isinstance(self.budget, float)

    @property
    def needs_queries(self) -> bool:
        """Whether ``score`` reads the queries of the last ``window`` tokens."""
        return self.evidence is Evidence.WINDOW_QUERIES

    @property
    def every(self) -> int | None:
        """Tokens between two times that a request is packed; None where it is packed once."""
        return self.interval if self.chunk is None else self.chunk

    def without_sinks(self) -> ScoredEviction:
        """The same for tokens that do not begin a context."""
        return replace(self, sinks=0)

    def pages(self, page_size: int, budget: int | None = None) -> int:
        """Pages of ``page_size`` tokens that a layer with this budget keeps at most; of a chunk,
        where it is a share of it. Raises ValueError where that is all of it."""
        if not self.appends:
            return int(-(-(budget or self.budget) // page_size))
        assert self.chunk is not None
        chunk = -(-self.chunk // page_size)
        kept = ceil(self.budget * chunk)
        if kept == chunk:
            raise ValueError(
                f"{self.name}: {self.budget:.0%} of a chunk of {self.chunk} tokens are all of its "
                f"{chunk} pages of {page_size} tokens; write a larger chunk, or a smaller budget"
            )
        return kept

    @abstractmethod
    def score(self, prompt: PromptKV) -> Tensor:
        """What each token is worth to each KV head; higher is kept. -> [B, H, T] fp32

        Scores beyond a prompt's length may be anything. Every token of the prompt counts as
        evidence, also where the partial last page and ``window`` are kept in any case.
        """


@dataclass(frozen=True, kw_only=True)
class LayerBudgets(Policy):
    """Gives each layer its own share of what a wrapped policy keeps.

    An engine's page spans the layers of a group, so layers of different budgets free their pages
    in groups of their own: few budgets, for equally many layers each.
    """

    stage = Stage.COMPRESS
    action = Action.EVICTION
    granularity = Granularity.LAYER
    memory = "budget, plus the answer; the mean over the layers"
    reads = "budget, plus the answer; the mean over the layers"

    base: ScoredEviction

    def __post_init__(self) -> None:
        if not isinstance(self.base, ScoredEviction):
            raise ValueError(
                f"{self.name} wraps a policy that scores a prompt's tokens, got {self.base}; "
                f"write {self.name}(snapkv(budget=1024))"
            )
        if self.base.every is not None:
            raise ValueError(
                f"{self.name}: layers that keep different budgets pack prompts alone, at their "
                f"end, got {self.base}; leave interval and chunk out"
            )

    @abstractmethod
    def layer_budgets(self, layers: int) -> tuple[int, ...]:
        """Tokens that each of a model's layers keeps of a prompt's whole pages, first to last.

        Their mean is ``base.budget``, none is below ``base.sinks + base.window``.
        """


@dataclass(frozen=True, kw_only=True)
class LocalLayers(Policy):
    """Lets some layers see a window of the context alone, as models may have them by their
    configuration: what lies before it leaves their cache.

    It changes the model and no request: all that a server serves has it, whatever else stands in
    the line. The policies beside it plan the layers that see all.
    """

    stage = Stage.COMPRESS
    action = Action.EVICTION
    granularity = Granularity.LAYER
    evidence = Evidence.NONE
    query_agnostic = True
    memory = "window in its layers, all in the others"
    reads = "window in its layers, all in the others"

    widest: ClassVar[int] = (1 << 31) - 1
    """Tokens: kernels hold windows in 32 bits."""

    window: int = 1024
    """Most recent tokens that those layers see, the current one included."""

    def __post_init__(self) -> None:
        whole = isinstance(self.window, int) and not isinstance(self.window, bool)
        if not whole or not 1 <= self.window <= self.widest:
            raise ValueError(
                f"{self.name}: window must be a number of tokens, at least 1 and below 2 ** 31, "
                f"got {self.window!r}; write window=1024"
            )

    @abstractmethod
    def local_layers(self, layers: int) -> tuple[int, ...]:
        """Which of a model's attention layers see the window alone, ascending; one at least.

        layers: how many the model has, those with a window of its own included; they are counted
        from 0. Raises ValueError where the policy names others.
        """
