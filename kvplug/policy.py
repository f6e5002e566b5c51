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

from abc import ABC
from dataclasses import dataclass, fields
from enum import Enum
from itertools import chain
from typing import ClassVar, Protocol

import numpy as np
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
    REPETITION = "queries of a repetition"


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
        told = [f for f in fields(self) if f.init and f.repr]
        options = [(f.name, getattr(self, f.name), f.default) for f in told]
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
    def files(self) -> tuple[str, ...]:
        """Of heads (``kvplug.heads``), which it reads where it is served: the server's own, so no
        request may name another."""
        return ()

    @property
    def alone(self) -> str:
        """Why it is combined with no other policy; empty where it may be."""
        return ""

    @property
    def publishes(self) -> Sharing:
        """Whom what the policy leaves in the cache may serve."""
        if self.action is not Action.EVICTION:
            return Sharing.PLAIN
        return Sharing.OWN if self.query_agnostic else Sharing.NOBODY
