"""A served engine: a command line, an environment, and what it counts of itself."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

MiB = 1 << 20
NAME = "served"
"""Of the model, in requests."""


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """One reading of a server's ``/metrics``; counts are since the server's start."""

    policy: str | None
    """As kvplug's own counters name it; None before the first step."""
    pool: int
    """KV blocks that requests may hold."""
    held: int
    """KV blocks that requests do hold."""
    running: int
    """Requests in the batch."""
    fits: float | None
    """Requests of the greatest length that fit at once; None where the engine does not say."""
    queries: float
    """Decode queries."""
    cached: float
    """Tokens behind them: what dense attention reads."""
    read: float
    """Tokens that they read, mean over the layers."""
    cached_bytes: float
    """As ``cached``, of all layers."""
    read_bytes: float
    """As ``read``, of all layers, digests included."""
    preempted: int
    """Requests that the engine took out of the batch for want of blocks."""
    stored: float = 0.0
    """Bytes that went to host memory."""
    loaded: float = 0.0
    """Bytes that came back."""


@dataclass(frozen=True, kw_only=True)
class Engine(ABC):
    """What every policy's server has in common. Subclasses translate it for one engine."""

    title: ClassVar[str]
    package: ClassVar[str]
    launcher: ClassVar[str]
    """The command as a user knows it, for the console."""
    make: ClassVar[str]
    """The target of the Makefile that sets all up."""
    metrics: ClassVar[Sequence[str]]
    """What ``state`` needs of the engine's own."""
    preemptions: ClassVar[str]
    """The engine's counter of them; it may be absent as long as there was none."""
    moves: ClassVar[Sequence[str]] = ()
    """The engine's counters of bytes to and from host memory, where it has such."""

    model: Path
    block_size: int = 32
    """Tokens per block."""
    chunk: int = 512
    """Most tokens a step computes: longer prompts are prefilled in chunks."""
    kv_cache_mib: int = 256
    max_model_len: int = 8192
    max_num_seqs: int = 8
    dtype: str = "auto"
    threads: int = min(8, len(os.sched_getaffinity(0)))

    @abstractmethod
    def command(self, policy: str, port: int) -> list[str]:
        """What starts a server of the model named ``NAME`` on 127.0.0.1."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """Environment variables of the server, beside those of every engine."""

    @abstractmethod
    def read(self, found: Mapping[str, Sample]) -> dict[str, object]:
        """pool, held, running and fits of an EngineState, from samples by name."""

    @property
    @abstractmethod
    def mode(self) -> str:
        """How a step is computed, in a word."""

    def environment(self) -> dict[str, str]:
        common = {
            "OMP_NUM_THREADS": str(self.threads),
            # Threads that spin at barriers cost tenfold as soon as another process wants a core.
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        return {**os.environ, **common, **self.settings()}

    def state(self, text: str) -> EngineState:
        """Read ``/metrics``. Raises ValueError that names what this server does not tell."""
        wanted = (*self.metrics, self.preemptions, *self.moves, "kvplug_")
        lines = [line for line in text.splitlines() if line.startswith(wanted)]
        found = {
            sample.name: sample
            for family in text_string_to_metric_families("\n".join(lines) + "\n")
            for sample in family.samples
        }
        for name in self.metrics:
            if name not in found:
                raise ValueError(
                    f"the server's /metrics has no {name}; install the {self.title} that this "
                    f"kvplug knows: pip install 'kvplug[{self.package}]'"
                )
        counters = [
            found.get(f"kvplug_{name}_total")
            for name in (
                "decode_queries", "cached_tokens", "read_tokens", "cached_bytes", "read_bytes"
            )
        ]  # fmt: skip
        values = [counter.value if counter else 0.0 for counter in counters]
        queries, cached, read, cached_bytes, read_bytes = values
        preempted = found.get(self.preemptions)
        moved = [found[name].value if name in found else 0.0 for name in self.moves]
        stored, loaded = moved or (0.0, 0.0)
        return EngineState(
            policy=counters[0].labels["policy"] if counters[0] else None,
            queries=queries,
            cached=cached,
            read=read,
            cached_bytes=cached_bytes,
            read_bytes=read_bytes,
            preempted=int(preempted.value) if preempted else 0,
            stored=stored,
            loaded=loaded,
            **self.read(found),  # type: ignore[arg-type]
        )

    def as_json(self) -> dict[str, object]:
        return {"engine": self.package, **asdict(self), "model": str(self.model)}
