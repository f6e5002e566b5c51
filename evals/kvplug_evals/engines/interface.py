"""What an evaluation asks of an engine, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvplug_evals.models.folder import AUTO

MiB = 1 << 20


class EngineError(Exception):
    """What failed, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Greedy decoding behind a prompt.

    ``forced`` tokens are what the engine decodes first, whatever the model would say: each is fed
    as the model's own, so it is read from the cache as a policy left it.
    """

    key: str
    prompt: list[int]
    forced: list[int] = field(default_factory=list)
    new_tokens: int = 0
    """Free tokens behind the forced ones."""
    until: tuple[str, ...] = ()
    """Texts that end the free part; they are not returned."""
    scored: int = 0
    """How many of the last forced tokens to return the model's log-probability for."""
    policy: str | None = None
    """Its own choice, of what ``EngineOptions.allow`` lets requests choose; None for the
    server's."""
    chunks: Sequence[tuple[int, int]] = ()
    """Spans [first, last) of the prompt that a policy of the stage reuse may take from elsewhere:
    under one, each was read alone before."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    key: str
    text: str
    tokens: list[int]
    """The free tokens."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the engine's prefix cache."""
    first_token_seconds: float
    token_seconds: float
    """Per output token after the first, forced ones included; 0 for a single token."""
    losses: list[float]
    """-log p of each scored token, in nats."""
    agreed: list[bool]
    """Whether each scored token is the model's own first choice."""


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Requests submitted at once, and what the engine said of itself meanwhile."""

    replies: list[Reply]
    seconds: float
    peak_blocks: int
    """Most KV blocks held at once."""
    held_blocks: int
    """KV blocks held while all of them decoded: what a policy leaves of the prompts."""
    queries: float
    """Decode queries, as kvplug's counters say."""
    cached: float
    """Tokens behind these: what dense attention reads."""
    read: float
    """Tokens that they read, mean over the layers."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What all settings of a sweep have in common, but for the policy."""

    model: str
    max_model_len: int
    max_num_seqs: int
    block_size: int = 32
    max_num_batched_tokens: int = 2048
    threads: int = 1
    enforce_eager: bool = True
    kv_cache_mib: int = 512
    dtype: str = AUTO
    """Of weights and cache; see `served_dtype`."""
    multiprocess: bool = True
    """An engine in processes of its own, where kvplug's compiled CPU code serves."""
    allow: tuple[str, ...] = ()
    """Policies that requests may choose, by name."""
    max_budget: int | None = None
    """The most tokens that such a request may keep."""

    def offer(self, policy: str) -> dict[str, Any]:
        """kvplug's configuration of a server of that policy."""
        given: dict[str, Any] = {"policy": policy}
        if self.allow:
            given["allow"] = list(self.allow)
        if self.max_budget is not None:
            given["max_budget"] = self.max_budget
        return given


class Engine(Protocol):
    block_bytes: int
    """Of one block over all layers, as the engine allocates it."""
    blocks: int
    """In the pool."""

    def run(
        self, requests: Sequence[Request], finished: Callable[[Reply], object] | None = None
    ) -> Wave:
        """Submit all at once; ``finished`` is called as each ends."""

    def forget(self) -> None:
        """Empty the prefix cache."""

    def close(self) -> None: ...
