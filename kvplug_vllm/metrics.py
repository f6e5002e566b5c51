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

from kvplug import Settings, StepReads
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

    @classmethod
    def for_engine(cls, engine: Engine) -> Metrics | None:
        if cls._owner is engine or engine.vllm_config.parallel_config.rank != 0:
            return None
        cls._owner = engine
        return cls()

    def count(self, reads: StepReads, settings: Settings) -> None:
        if reads.queries:
            queries, cached, read, *_ = _labelled(settings)
            queries.inc(reads.queries)
            cached.inc(reads.cached)
            read.inc(reads.read)

    def count_packed(
        self, prompt: NDArray[np.int64], keep: NDArray[np.int64], settings: Settings
    ) -> None:
        """prompt, keep [n]: tokens of the prompts packed in a step, and of those that stay."""
        *_, packed, kept, dropped = _labelled(settings)
        packed.inc(len(prompt))
        kept.inc(float(keep.sum()))
        dropped.inc(float((prompt - keep).sum()))


@cache
def _labelled(settings: Settings) -> tuple[Counter, ...]:
    return tuple(counter.labels(str(settings.policy)) for counter in _counters())
