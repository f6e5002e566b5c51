"""What kvplug counts, on SGLang's ``/metrics`` with ``--enable-metrics``: as in vLLM, by the same
names. A block is a page here, which spans all layers.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from kvplug import Labels, Refused, StepReads

BY_POLICY = {
    "decode_queries": "Decode queries attended.",
    "cached_tokens": "Tokens behind the decode queries.",
    "read_tokens": "Tokens read by the decode queries per layer.",
    "packed_prompts": "Prompts that were compressed.",
    "kept_tokens": "Tokens that a KV head kept of them.",
    "dropped_tokens": "Tokens that a KV head dropped of them.",
    "packing_seconds": "Seconds the host spent compressing prompts.",
    "returned_blocks": "Blocks that living requests gave back.",
    "saved_bytes": "Bytes of them, less those of private blocks, a rank.",
}
REFUSED = "refused_requests", "Requests refused at admission."
WHOLE = "whole_prompts", "Prompts that were not compressed for want of room."
"""In SGLang alone: vLLM waits for room, or preempts."""


@cache
def _counter(name: str, about: str, *labels: str) -> Counter:
    """Once a process, which may serve one engine after another."""
    return Counter(f"kvplug_{name}", about, labels)


class Metrics:
    """On an engine's first rank only: others would count the same step again."""

    def __init__(self, policy: str) -> None:
        """policy: the server's own."""
        self._label = Labels()
        self._by_policy = {
            name: _counter(name, about, "policy") for name, about in BY_POLICY.items()
        }
        self._refused = _counter(*REFUSED, "reason")
        self._whole = _counter(*WHOLE)
        for name in BY_POLICY:  # a rate needs to have seen the zero
            self._add(name, policy, 0)

    def count(self, policy: str, reads: StepReads, share: float) -> None:
        """share: of the layers that this was planned for."""
        if reads.queries:
            self._add("decode_queries", policy, share * reads.queries)
            self._add("cached_tokens", policy, share * reads.cached)
            self._add("read_tokens", policy, share * reads.read)

    def count_packed(
        self, policy: str, prompt: NDArray[np.int64], keep: NDArray[np.int64], share: float
    ) -> None:
        """prompt, keep [n]: tokens of the prompts packed in a step, and of those that stay."""
        self._add("packed_prompts", policy, share * len(prompt))
        self._add("kept_tokens", policy, share * float(keep.sum()))
        self._add("dropped_tokens", policy, share * float((prompt - keep).sum()))

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
        self._refused.labels(error.reason if isinstance(error, Refused) else "unreadable").inc()

    def count_whole(self) -> None:
        self._whole.inc()

    def _add(self, name: str, policy: str, amount: float) -> None:
        self._by_policy[name].labels(self._label(policy)).inc(amount)
