"""Decode reads as Prometheus counters.

vLLM's ``/metrics`` shows them when workers and server share PROMETHEUS_MULTIPROC_DIR (set it to
an empty folder before ``vllm serve``); without it they stay in the worker's own registry.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from kvplug import StepReads
from kvplug_vllm.settings import Engine


@cache
def _counters() -> tuple[Counter, ...]:
    return (
        Counter("kvplug_decode_queries", "Decode queries attended.", ["policy"]),
        Counter("kvplug_cached_tokens", "Tokens behind the decode queries.", ["policy"]),
        Counter("kvplug_read_tokens", "Tokens read by the decode queries per layer.", ["policy"]),
        Counter("kvplug_packed_prompts", "Prompts that were compressed.", ["policy"]),
        Counter("kvplug_kept_tokens", "Tokens that a KV head kept of them.", ["policy"]),
        Counter("kvplug_dropped_tokens", "Tokens that a KV head dropped of them.", ["policy"]),
    )


class Metrics:
    """One per engine and on its first rank only: others would count the same step again."""

    _owner: ClassVar[Engine | None] = None

    def __init__(self, policy: str) -> None:
        counters = [counter.labels(policy) for counter in _counters()]
        self.queries, self.cached, self.read = counters[:3]
        self.packed, self.kept, self.dropped = counters[3:]

    @classmethod
    def for_engine(cls, engine: Engine) -> Metrics | None:
        if cls._owner is engine or engine.vllm_config.parallel_config.rank != 0:
            return None
        cls._owner = engine
        return cls(str(engine.settings.policy))

    def count(self, reads: StepReads) -> None:
        if reads.queries:
            self.queries.inc(reads.queries)
            self.cached.inc(reads.cached)
            self.read.inc(reads.read)

    def count_packed(self, prompt: NDArray[np.int64], keep: NDArray[np.int64]) -> None:
        """prompt, keep [n]: tokens of the prompts packed in a step, and of those that stay."""
        self.packed.inc(len(prompt))
        self.kept.inc(float(keep.sum()))
        self.dropped.inc(float((prompt - keep).sum()))
