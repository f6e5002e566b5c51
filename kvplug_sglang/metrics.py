"""What kvplug counts, on SGLang's ``/metrics`` with ``--enable-metrics``: as in vLLM, by the same
names. A block is a page here, which spans all layers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from kvplug import Event, Refused, StepReads
from kvplug.counting import Counter, Counters

BY_POLICY = {
    "decode_queries": "Decode queries attended.",
    "cached_tokens": "Tokens behind the decode queries.",
    "read_tokens": "Tokens read by the decode queries per layer.",
    "cached_bytes": "Bytes of the tokens behind them, a rank.",
    "read_bytes": "Bytes that they read, digests included, a rank.",
    "packed_prompts": "Prompts that were compressed.",
    "kept_tokens": "Tokens that a KV head kept of them.",
    "dropped_tokens": "Tokens that a KV head dropped, of answers too.",
    "packing_seconds": "Seconds the host spent compressing prompts.",
    "returned_blocks": "Blocks that living requests gave back.",
    "saved_bytes": "Bytes of them, less those of private blocks, a rank.",
    "prefill_queries": "Queries of prompts attended.",
    "prefill_cached_tokens": "Tokens up to prompts' queries.",
    "prefill_read_tokens": "Tokens that they read per layer.",
}
REFUSED = "refused_requests", "Requests refused at admission."
WHOLE = "whole_prompts", "Prompts that were not compressed for want of room."
"""In SGLang alone: vLLM waits for room, or preempts."""

log = logging.getLogger("sglang.kvplug")


@cache
def _counters() -> Counters:
    """Of this process, which may serve one engine after another. SGLang's ``/metrics`` adds up
    the files of a folder; without ``--enable-metrics`` there is none."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    counters = Counters((lambda: folder) if folder else None, log)
    REGISTRY.register(_Shown(counters))
    return counters


class _Shown(Collector):
    """What was counted, for whoever asks in the same process."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        found: dict[Counter, CounterMetricFamily] = {}
        for counter, label, value in self._counters.values():
            if counter not in found:
                named = [counter.label] if counter.label else None
                found[counter] = CounterMetricFamily(
                    f"kvplug_{counter.name}", counter.help, labels=named
                )
            found[counter].add_metric([label] if counter.label else [], value)
        yield from found.values()


class Metrics:
    """On an engine's first rank only: others would count the same step again."""

    def __init__(self, policy: str) -> None:
        """policy: the server's own."""
        self._counters = _counters()
        self._by_policy = {
            name: Counter(name, about, "policy") for name, about in BY_POLICY.items()
        }
        for name in BY_POLICY:  # a rate needs to have seen the zero
            self._add(name, policy, 0)
        self._counters.add(Counter(*WHOLE), 0)

    def count(
        self, policy: str, reads: StepReads, share: float, token: float, digest: float
    ) -> None:
        """share: of the layers that this was planned for. token, digest: bytes of a token in all
        of these, and its share of its pages' digests."""
        if reads.queries:
            self._add("decode_queries", policy, share * reads.queries)
            self._add("cached_tokens", policy, share * reads.cached)
            self._add("read_tokens", policy, share * reads.read)
            cached, read = reads.bytes(token, digest)
            self._add("cached_bytes", policy, cached)
            self._add("read_bytes", policy, read)
        prefill = reads.prefill
        if prefill is not None and prefill.queries:
            self._add("prefill_queries", policy, share * prefill.queries)
            self._add("prefill_cached_tokens", policy, share * prefill.cached)
            self._add("prefill_read_tokens", policy, share * prefill.read)

    def count_packed(self, policy: str, event: Event, share: float) -> None:
        """What a prompt kept is counted once."""
        if not event.era:
            self._add("packed_prompts", policy, share)
            self._add("kept_tokens", policy, share * event.stay)
        self._add("dropped_tokens", policy, share * (event.tokens - event.stay))

    def count_packing(self, policy: str, seconds: float) -> None:
        """Of one layer."""
        self._add("packing_seconds", policy, seconds)

    def count_returned(self, policy: str, pages: int, private: int, page_bytes: int) -> None:
        """A request gave back ``pages`` and holds ``private`` ones in their place.

        A page that others share is evictable once all of them have given it back. page_bytes:
        what the pool allocates for a page on one rank.
        """
        self._add("returned_blocks", policy, pages)
        self._add("saved_bytes", policy, (pages - private) * page_bytes)

    def count_refused(self, error: ValueError) -> None:
        reason = error.reason if isinstance(error, Refused) else "unreadable"
        self._counters.add(Counter(*REFUSED, "reason"), 1, reason)

    def count_whole(self) -> None:
        self._counters.add(Counter(*WHOLE), 1)

    def _add(self, name: str, policy: str, amount: float) -> None:
        self._counters.add(self._by_policy[name], amount, policy)
