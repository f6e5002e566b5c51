"""What kvplug counts, on vLLM's own ``/metrics``.

The worker counts what queries read and what prompts keep, the scheduler's process what
returns to the pool, the API server what it refuses; ``counters`` brings them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from kvplug import Event, Settings, StepReads
from kvplug.counting import Counter
from kvplug_vllm.counters import add
from kvplug_vllm.settings import Engine

QUERIES = Counter("decode_queries", "Decode queries attended.", "policy")
CACHED = Counter("cached_tokens", "Tokens behind the decode queries.", "policy")
READ = Counter("read_tokens", "Tokens read by the decode queries per layer.", "policy")
DENSE_BYTES = Counter("cached_bytes", "Bytes of the tokens behind them, a rank.", "policy")
READ_BYTES = Counter("read_bytes", "Bytes that they read, digests included, a rank.", "policy")
PACKED = Counter("packed_prompts", "Prompts that were compressed.", "policy")
KEPT = Counter("kept_tokens", "Tokens that a KV head kept of them.", "policy")
DROPPED = Counter("dropped_tokens", "Tokens that a KV head dropped, of answers too.", "policy")
SECONDS = Counter("packing_seconds", "Seconds the host spent compressing prompts.", "policy")
RETURNED = Counter("returned_blocks", "Blocks that living requests gave back.", "policy")
SAVED = Counter("saved_bytes", "Bytes of them, less those of private blocks, a rank.", "policy")
PREFILL = Counter("prefill_queries", "Queries of prompts attended.", "policy")
PREFILL_CACHED = Counter("prefill_cached_tokens", "Tokens up to prompts' queries.", "policy")
PREFILL_READ = Counter("prefill_read_tokens", "Tokens that they read per layer.", "policy")
REFUSED = Counter("refused_requests", "Requests refused at admission.", "reason")

BY_POLICY = (
    QUERIES, CACHED, READ, DENSE_BYTES, READ_BYTES, PACKED, KEPT, DROPPED, SECONDS, RETURNED,
    SAVED, PREFILL, PREFILL_CACHED, PREFILL_READ,
)  # fmt: skip
ALL = (*BY_POLICY, REFUSED)


def page_bytes(spec: Any) -> tuple[int, int]:
    """Of a page's tokens, and of what lies behind them: some specs call their digests content."""
    tokens = spec.unpadded_page_size_bytes - getattr(spec, "digest_bytes", 0)
    return tokens, spec.page_size_bytes - tokens


@dataclass(frozen=True)
class Metrics:
    """Of a worker: on its engine's first rank only, others would count the same step again."""

    share: float
    """Of the planned layers, those that are counted here: each group of layers counts its own."""
    token: float
    """Bytes of a token in all of them on this rank."""
    digest: float
    """And its share of the digests of its pages."""

    @classmethod
    def of(cls, engine: Engine, share: float, layers: Sequence[int], spec: Any) -> Metrics | None:
        """layers: that are counted here, whose cache is ``spec``. None on other ranks."""
        if engine.vllm_config.parallel_config.rank != 0:
            return None
        for counter in BY_POLICY:  # a rate needs to have seen the zero
            add(counter, 0, str(engine.settings.policy))
        token, digest = page_bytes(spec)
        if engine.offer.format is not None:  # what chooses reads the keys' codes
            format = engine.offer.format.in_layer(layers[0])
            dtype = engine.vllm_config.model_config.dtype
            layout = format.layout(spec.block_size, spec.head_size, dtype)
            digest = layout.key_bytes * spec.num_kv_heads
        each = len(layers) / spec.block_size
        return cls(share, each * token, each * digest)

    def count(self, reads: StepReads, settings: Settings) -> None:
        if reads.queries:
            self._add(QUERIES, reads.queries, settings)
            self._add(CACHED, reads.cached, settings)
            self._add(READ, reads.read, settings)
            cached, read = reads.bytes(self.token, self.digest)
            add(DENSE_BYTES, cached, str(settings.policy))
            add(READ_BYTES, read, str(settings.policy))
        prefill = reads.prefill
        if prefill is not None and prefill.queries:
            self._add(PREFILL, prefill.queries, settings)
            self._add(PREFILL_CACHED, prefill.cached, settings)
            self._add(PREFILL_READ, prefill.read, settings)

    def count_packed(self, event: Event, settings: Settings) -> None:
        """What a prompt kept is counted once."""
        if not event.era:
            self._add(PACKED, 1, settings)
            self._add(KEPT, event.stay, settings)
        self._add(DROPPED, event.tokens - event.stay, settings)

    def _add(self, counter: Counter, amount: float, settings: Settings) -> None:
        add(counter, amount * self.share, str(settings.policy))


@contextmanager
def packing(engine: Engine | None, settings: Settings) -> Iterator[None]:
    """Time what compresses. On a GPU these are the host's seconds, not the kernels'."""
    began = perf_counter()
    yield
    if engine is not None and engine.vllm_config.parallel_config.rank == 0:
        add(SECONDS, perf_counter() - began, str(settings.policy))


def count_returned(policy: str, blocks: int, private: int, block_bytes: int) -> None:
    """A request gave back ``blocks`` and holds ``private`` ones in their place.

    A block that others share is free once all of them have given it back. block_bytes: what the
    engine allocates for a block on one rank.
    """
    if blocks:
        add(RETURNED, blocks, policy)
        add(SAVED, (blocks - private) * block_bytes, policy)


def count_refused(reason: str) -> None:
    """In the API server's process. reason: one of a few words, such as ``max_budget``."""
    add(REFUSED, 1, reason)
