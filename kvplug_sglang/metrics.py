"""Decode reads as Prometheus counters, on SGLang's ``/metrics`` with ``--enable-metrics``."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from kvplug import Refused, StepReads


@cache
def _counters() -> tuple[Counter, ...]:
    return (
        Counter("kvplug_decode_queries", "Decode queries attended.", ["policy"]),
        Counter("kvplug_cached_tokens", "Tokens behind the decode queries.", ["policy"]),
        Counter("kvplug_read_tokens", "Tokens read by the decode queries per layer.", ["policy"]),
        Counter("kvplug_packed_prompts", "Prompts that were compressed.", ["policy"]),
        Counter("kvplug_kept_tokens", "Tokens that a KV head kept of them.", ["policy"]),
        Counter("kvplug_dropped_tokens", "Tokens that a KV head dropped of them.", ["policy"]),
        Counter("kvplug_returned_blocks", "Pages that living requests gave back.", ["policy"]),
        Counter("kvplug_whole_prompts", "Prompts that were not compressed for want of room."),
        Counter("kvplug_refused_requests", "Requests refused at admission.", ["reason"]),
    )


class Metrics:
    """On an engine's first rank only: others would count the same step again."""

    def __init__(self) -> None:
        self.queries, self.cached, self.read = _counters()[:3]
        self.packed, self.kept, self.dropped = _counters()[3:6]
        self.returned, self.whole, self.refused = _counters()[6:]

    def count(self, policy: str, reads: StepReads, share: float) -> None:
        """share: of the layers that this was planned for."""
        if reads.queries:
            self.queries.labels(policy).inc(share * reads.queries)
            self.cached.labels(policy).inc(share * reads.cached)
            self.read.labels(policy).inc(share * reads.read)

    def count_packed(
        self, policy: str, prompt: NDArray[np.int64], keep: NDArray[np.int64], share: float
    ) -> None:
        """prompt, keep [n]: tokens of the prompts packed in a step, and of those that stay."""
        self.packed.labels(policy).inc(share * len(prompt))
        self.kept.labels(policy).inc(share * float(keep.sum()))
        self.dropped.labels(policy).inc(share * float((prompt - keep).sum()))

    def count_returned(self, policy: str, pages: int) -> None:
        """A request gave back so many pages, less those it holds in their place."""
        self.returned.labels(policy).inc(pages)

    def count_refused(self, error: ValueError) -> None:
        reason = error.reason if isinstance(error, Refused) else "unreadable"
        self.refused.labels(reason).inc()

    def count_whole(self) -> None:
        self.whole.inc()
