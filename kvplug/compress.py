"""What fills the stage compress: which tokens stay.

Axes as in ``kvplug.policy``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from kvplug.policy import LIMIT, Action, Evidence, Granularity, Policy, Positions, Stage


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
    first rows to garbage. Where there is a repetition, its queries.
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
    repeated: Tensor | None = None
    """Keys of the repetition whose queries score a chunk: its tokens again, behind it. [B, W, H,
    D]; None where nothing is repeated."""
    first: Tensor | None = None
    """Keys of the context's first tokens, where a later chunk of it is scored by a repetition: its
    queries see them too. [B, n, H, D]"""

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
        by_window = self.evidence is Evidence.WINDOW_QUERIES
        if self.chunk is not None and by_window:
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
        counts = [("sinks", 0), ("window", int(by_window))]
        for name, least in counts if self.appends else [("budget", 1), *counts]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{self.name}: {name} must be a number of tokens, at least {least}, got "
                    f"{value!r}; write {self.name}({name}={getattr(type(self), name)})"
                )
        kept = int(self.budget * self.chunk) if self.appends and self.chunk else self.budget
        if kept < self.sinks + self.window:
            raise ValueError(
                f"{self.name}: budget must be at least sinks + window = "
                f"{self.sinks + self.window} tokens, got {kept}; raise the budget or lower "
                "the other two"
            )
        if by_window and self.interval is not None and self.interval < self.window:
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
        """Whether ``score`` reads queries: of the last ``window`` tokens, or of a repetition."""
        return self.compiles or self.evidence is Evidence.WINDOW_QUERIES

    @property
    def alone(self) -> str:
        if not self.compiles:
            return ""
        return (
            "finds contexts as requests of their own left them, and was never taught what another "
            "policy reads or leaves there"
        )

    @property
    def compiles(self) -> bool:
        """Whether requests of their own repeat a context, a chunk each, and what they keep of it
        is found by all later ones; what was never repeated stays whole."""
        return self.evidence is Evidence.REPETITION

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

    def kinds(self, layer: int) -> tuple[bool, ...] | None:
        """Which KV heads of a layer, as the model numbers it, keep more pages than the others;
        None where all keep as many."""
        return None

    @abstractmethod
    def score(self, prompt: PromptKV) -> Tensor:
        """What each token is worth to each KV head; higher is kept. -> [B, H, T] fp32

        Scores beyond a prompt's length may be anything. Every token of the prompt counts as
        evidence, also where the partial last page and ``window`` are kept in any case.
        """


@dataclass(frozen=True, kw_only=True)
class WrappedScore(ScoredEviction):
    """Changes what a wrapped policy scores. Its budget, sinks, window, interval and chunk are the
    wrapped one's, as what it looks at."""

    example: ClassVar[str]
    """A line of it."""

    base: ScoredEviction
    """Whose budget, sinks and window these are too, as what it looks at."""

    budget: int | float = field(init=False)
    sinks: int = field(init=False)
    window: int = field(init=False)
    interval: int | None = field(init=False)
    chunk: int | None = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, ScoredEviction) or isinstance(self.base, HeadBudgets):
            raise ValueError(
                f"{self.name} wraps a policy that scores a prompt's tokens, got {self.base}; "
                f"write {self.example}"
            )
        taken = [each.name for each in fields(ScoredEviction)]
        for name in (*taken, "evidence", "query_agnostic"):
            object.__setattr__(self, name, getattr(self.base, name))


@dataclass(frozen=True, kw_only=True)
class HeadBudgets(WrappedScore):
    """Gives the KV heads of a layer their own shares of what a wrapped policy keeps.

    An engine's page holds tokens of all of a layer's heads, so private pages are given to heads in
    parts (``kvplug.head_pages``): as many of them as the wrapped policy's hold what all heads
    keep, of whatever share each. Heads are those of a layer, on one rank.
    """

    granularity = Granularity.HEAD
    memory = "budget, plus the answer; the mean over the heads"
    reads = "budget, plus the answer; the mean over the heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.every is not None or self.base.compiles:
            raise ValueError(
                f"{self.name}: heads that keep different numbers of pages pack prompts alone, at "
                f"their end, as an event packs as much of every head, got {self.base}; leave "
                "interval and chunk out"
            )

    @property
    def alone(self) -> str:
        return (
            "leaves pages that hold tokens of one KV head each, and was never run with another "
            "policy that reads or leaves pages"
        )

    @abstractmethod
    def kinds(self, layer: int) -> tuple[bool, ...] | None: ...

    @abstractmethod
    def head_pages(
        self, kinds: tuple[bool, ...], private: Positions, whole: Positions, page_size: int
    ) -> Positions:
        """Pages of ``page_size`` tokens that each head of a layer of such ``kinds`` keeps of
        prompts of ``whole`` pages, packed into ``private`` ones: H times as many together at most,
        none of more than ``whole``, all of it where there are as many. [n], [n] -> [n, H]"""


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
        if not isinstance(self.base, ScoredEviction) or isinstance(self.base, HeadBudgets):
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
