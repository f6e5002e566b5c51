"""A chunk of a prompt in one layer: vLLM's CPU_ATTN against policies of the stage generate.

    python -m kvplug_evals.bench.prefill OPTIONS

The chunk's queries stand at the end of a context whose keys lie in the cache; what a policy reads
beside its own chunk it chooses by random keys and queries, whose attention is flat: times hold for
the share that was read, and say nothing of answers.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from kvplug import choose_pages, parse, step_reads
from kvplug.shown import progress
from kvplug_evals.bench.attention import Stopwatch
from kvplug_evals.bench.layer import Layer, Shape, fill, page_table
from kvplug_evals.bench.options import Clock, Heads
from kvplug_evals.bench.provenance import WIDTH, provenance, table

PARTS = {
    "keys": "kvplug_vllm.cpu.KVPlugImpl.keys_of",
    "estimate": "kvplug.policies.xattention.antidiagonal",
    "bounds": "kvplug.policies.block_quest.page_bound",
    "select": "kvplug.selection.page_select",
    "tables": "kvplug_vllm.attention.virtual_heads",
    "attention": "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward",
}
"""Of a layer's work -> the function that is timed for it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    policies: list[str]
    context: list[int]
    chunk: int
    heads: list[Heads]
    dtype: str
    block_size: int
    repeats: int
    threads: int
    clock: Clock
    out: Path
    command: str

    def __post_init__(self) -> None:
        for line in self.policies:
            if parse(line).generate is None:
                raise ValueError(
                    f"{line} does not say how a prompt is read; write, for example, "
                    "xattention(threshold=0.9, last=0)"
                )
        for context in self.context:
            if context <= self.chunk:
                raise ValueError(
                    f"a context of {context:,} tokens has nothing before its last chunk of "
                    f"{self.chunk:,}; raise --context, or lower --chunk"
                )
        if self.clock is Clock.CPU and self.threads > 1:
            raise ValueError("the clock cpu is that of one thread: add --threads 1")

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Options:
        given = json.loads(text)
        given |= {
            "heads": [Heads(**heads) for heads in given["heads"]],
            "clock": Clock(given["clock"]),
            "out": Path(given["out"]),
        }
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Milliseconds, medians; stock and ours in turn."""

    heads: str
    context: int
    policy: str
    read: float
    """Share of what stands before the queries."""
    stock: float
    ours: float
    ratio: float
    """Ours by stock's, the median of pairs."""
    spread: tuple[float, float]
    """The least and the greatest of them."""
    parts: dict[str, float]
    plan: float
    """Once a step, for all layers."""

    @property
    def of_read(self) -> float:
        """The ratio by the share that was read: 1 where time falls as reads do."""
        return self.ratio / self.read

    @property
    def estimate(self) -> float:
        """Of stock's time, what choosing takes."""
        chosen = ("keys", "estimate", "bounds", "select")
        return sum(self.parts.get(name, 0.0) for name in chosen) / self.stock


class Chunk:
    """The last queries of one request, in a stock layer and in one with a policy."""

    def __init__(self, options: Options, heads: Heads, context: int, line: str) -> None:
        self.options, self.line = options, line
        self.heads, self.shape = heads, Shape(
            B=1, T=context, Hq=heads.Hq, H=heads.H, D=heads.D, S=options.block_size,
            dtype=getattr(torch, options.dtype),
        )  # fmt: skip
        self.clock = thread_time if options.clock is Clock.CPU else perf_counter
        self.random = torch.Generator().manual_seed(0)
        self.stock, self.ours = Layer(self.shape), Layer(self.shape, line)
        self.table = page_table(self.shape, True, self.random)
        fill([self.stock, self.ours], self.table, self.random, keep=False)
        position = torch.arange(context - options.chunk, context)
        size = self.shape.S
        self.slots = self.table[0, position // size].long() * size + position % size
        for layer in (self.stock, self.ours):
            layer.plan(self.table, self.slots, options.chunk)

    def measure(self) -> Result:
        pairs, plans = [], []
        with Stopwatch(PARTS, self.clock) as watch:
            for number in range(1 + self.options.repeats):
                query = self._query()
                out = torch.empty_like(query)
                stock = self._timed(lambda: self.stock.attend(query, out))  # noqa: B023
                if number:
                    watch.start()
                ours = self._timed(lambda: self.ours.attend(query, out))  # noqa: B023
                watch.stop()
                pairs.append((stock, ours))
                plans.append(
                    self._timed(lambda: self.ours.plan(self.table, self.slots, self.options.chunk))
                )
        ratios = sorted(ours / stock for stock, ours in pairs[1:])
        return Result(
            heads=self.heads.name,
            context=self.shape.T,
            policy=self.line,
            read=self.share_read(),
            stock=median(stock for stock, _ in pairs[1:]),
            ours=median(ours for _, ours in pairs[1:]),
            ratio=median(ratios),
            spread=(ratios[0], ratios[-1]),
            parts={name: median(times) for name, times in watch.laps.items() if any(times)},
            plan=median(plans[1:]),
        )

    def share_read(self) -> float:
        """Of what the chunk's queries see: by what the blocks chose, else by the plan."""
        with chosen() as counts:
            query = self._query()
            self.ours.attend(query, torch.empty_like(query))
        if counts:
            read, seen = (sum(each) for each in zip(*counts, strict=True))
            return read / seen
        planner = self.ours.builder.planner.planners[0]
        total = self.shape.T
        asked = (torch.tensor([n]).numpy() for n in (total - self.options.chunk, total, total))
        reads = step_reads(planner.plan(*asked), planner, [None]).prefill
        assert reads is not None
        return reads.read / reads.cached

    def _query(self) -> Tensor:
        shape = self.options.chunk, self.shape.Hq, self.shape.D
        return torch.randn(shape, generator=self.random).to(self.shape.dtype)

    def _timed(self, call: Callable[[], None]) -> float:
        began = self.clock()
        call()
        return (self.clock() - began) * 1e3


@contextmanager
def chosen() -> Iterator[list[tuple[float, float]]]:
    """Pages read and seen by the blocks of each choice."""
    found: list[tuple[float, float]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        pages, counts = choose_pages(*args, **kwargs)
        seen = args[6]
        found.append((float(counts.float().mean(1).sum()), float(seen.sum())))
        return pages, counts

    with mock.patch("kvplug_vllm.attention.choose_pages", counted):
        yield found


def show(results: list[Result], source: dict[str, Any], options: Options, to: Console) -> None:
    to.print(
        f"[bold]{source['command']}[/]\n{source['date']}, commit {source['commit']}, vLLM "
        f"{source['vllm']}, torch {source['torch']}, {source['cpu']}, {options.threads} threads "
        f"of {source['cores']} cores, {options.clock} clock, "
        f"load {source['load_at_start']:.1f} to {source['load_at_end']:.1f}\n"
    )
    made = table(
        f"the last {options.chunk:,} queries of a prompt, {options.dtype}, blocks of "
        f"{options.block_size}: stock CPU_ATTN by policies, {options.repeats} pairs",
        ["heads", "tokens", "policy", "stock ms", "ms", "ratio", "range", "read", "by read",
         "choosing", "plan ms"],
        left=3,
    )  # fmt: skip
    for r in results:
        made.add_row(
            r.heads, f"{r.context:,}", r.policy, f"{r.stock:.0f}", f"{r.ours:.0f}",
            f"[bold]{r.ratio:.2f}[/]", f"{r.spread[0]:.2f} to {r.spread[1]:.2f}",
            f"{r.read:.0%}", f"{r.of_read:.2f}", f"{r.estimate:.1%}", f"{r.plan:.1f}",
            style="red" if r.ratio > 1 else None,
        )  # fmt: skip
    to.print(made)
    to.print(
        "ratio: a policy's time by stock's, of pairs. by read: that by the share read. choosing: "
        "keys read, estimate and selection, of stock's time. plan: once a step, not in the ratio."
    )


def run(options: Options, console: Console) -> list[Result]:
    """Measures, shows, and keeps JSON and text."""
    torch.set_num_threads(options.threads)
    source, results = provenance(options.command, "vllm"), []
    cells = list(product(options.heads, options.context, options.policies))
    with progress(console, len(cells)) as bar:
        for heads, context, line in cells:
            console.print(f"[dim]{heads.name}, {context:,} tokens, {line}[/]")
            results.append(Chunk(options, heads, context, line).measure())
            gc.collect()
            bar.advance()
    source["load_at_end"] = os.getloadavg()[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "provenance": source,
        "settings": json.loads(options.as_json()),
        "cells": [{**asdict(r), "by_read": r.of_read, "choosing": r.estimate} for r in results],
    }
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    width = WIDTH + 50
    show(results, source, options, Console(highlight=False, width=max(console.width, width)))
    with options.out.with_suffix(".txt").open("w") as file:
        show(results, source, options, Console(file=file, width=width, highlight=False))
    return results


if __name__ == "__main__":
    run(Options.from_json(sys.argv[1]), Console(highlight=False, stderr=True))
