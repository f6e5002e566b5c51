"""What kvplug counts, on vLLM's own ``/metrics``.

The worker counts what decode steps read and what prompts keep, the scheduler's process what
returns to the pool, the API server what it refuses; ``counters`` brings them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvplug import StepReads
from kvplug_vllm.counters import Counter
from kvplug_vllm.settings import Engine

QUERIES = Counter("decode_queries", "Decode queries attended.", "policy")
CACHED = Counter("cached_tokens", "Tokens behind the decode queries.", "policy")
READ = Counter("read_tokens", "Tokens read by the decode queries per layer.", "policy")
PACKED = Counter("packed_prompts", "Prompts that were compressed.", "policy")
KEPT = Counter("kept_tokens", "Tokens that a KV head kept of them.", "policy")
DROPPED = Counter("dropped_tokens", "Tokens that a KV head dropped of them.", "policy")
SECONDS = Counter("packing_seconds", "Seconds the host spent compressing prompts.", "policy")
RETURNED = Counter("returned_blocks", "Blocks that living requests gave back.", "policy")
SAVED = Counter("saved_bytes", "Bytes of them, less those of private blocks, a rank.", "policy")
REFUSED = Counter("refused_requests", "Requests refused at admission.", "reason")

BY_POLICY = (QUERIES, CACHED, READ, PACKED, KEPT, DROPPED, SECONDS, RETURNED, SAVED)
ALL = (*BY_POLICY, REFUSED)


class Metrics:
    """Of the worker: one per engine and on its first rank only, others would count again."""

    _engine: ClassVar[Engine | None] = None
    _metrics: ClassVar[Metrics | None] = None

    def __init__(self, policy: str) -> None:
        self.policy = policy
        for counter in BY_POLICY:  # a rate needs to have seen the zero
            counter.add(0, policy)

    @classmethod
    def of(cls, engine: Engine) -> Metrics | None:
        """None on other ranks."""
        if engine.vllm_config.parallel_config.rank != 0:
            return None
        if cls._engine is not engine or cls._metrics is None:
            cls._engine, cls._metrics = engine, cls(str(engine.settings.policy))
        return cls._metrics

    @classmethod
    def for_engine(cls, engine: Engine) -> Metrics | None:
        """For the first that asks: every group of layers plans the same steps."""
        return None if cls._engine is engine else cls.of(engine)

    def count(self, reads: StepReads) -> None:
        if reads.queries:
            QUERIES.add(reads.queries, self.policy)
            CACHED.add(reads.cached, self.policy)
            READ.add(reads.read, self.policy)

    def count_packed(self, prompt: NDArray[np.int64], keep: NDArray[np.int64]) -> None:
        """prompt, keep [n]: tokens of the prompts packed in a step, and of those that stay."""
        PACKED.add(len(prompt), self.policy)
        KEPT.add(float(keep.sum()), self.policy)
        DROPPED.add(float((prompt - keep).sum()), self.policy)


@contextmanager
def packing(engine: Engine | None) -> Iterator[None]:
    """Time what compresses. On a GPU these are the host's seconds, not the kernels'."""
    metrics = Metrics.of(engine) if engine is not None else None
    began = perf_counter()
    yield
    if metrics is not None:
        SECONDS.add(perf_counter() - began, metrics.policy)


def count_returned(policy: str, blocks: int, private: int, block_bytes: int) -> None:
    """A request gave back ``blocks`` and holds ``private`` ones in their place.

    A block that others share is free once all of them have given it back. block_bytes: what the
    engine allocates for a block on one rank.
    """
    if blocks:
        RETURNED.add(blocks, policy)
        SAVED.add((blocks - private) * block_bytes, policy)


def count_refused(reason: str) -> None:
    """In the API server's process. reason: one of a few words, such as ``max_budget``."""
    REFUSED.add(1, reason)
