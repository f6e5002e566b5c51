"""Whole servers under load: dense and policies, each in a server of its own.

Three loads. ``batch``: as many requests as always run together, whose prompts the prefix cache
holds from an earlier turn; what a step costs decides, which selection shortens. ``memory``: many
new prompts at once, of which the pool holds a few whole; how many run together decides, which
eviction raises. ``turns``: conversations over one context; what is kept of it between turns
decides. Every pool has the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from kvplug import parse
from kvplug.shown import progress
from kvplug_evals.bench.load import Load, Sent, send
from kvplug_evals.bench.prompts import MARGIN, prompts
from kvplug_evals.bench.provenance import provenance
from kvplug_evals.bench.turns import QUESTION_TOKENS, Conversations, converse
from kvplug_evals.models.folder import served_dtype, token_bytes
from kvplug_evals.served.engine import Engine, EngineState, MiB
from kvplug_evals.served.start import serve

BATCH, MEMORY, TURNS = "batch", "memory", "turns"
SAMPLE_SECONDS = 0.1
POLICIES = (
    "twilight(dense_layers=0)",
    "quest(budget=0.125, dense_layers=0)",
    "snapkv(budget=512)",
    "snapkv(budget=512) + twilight(dense_layers=0)",
)
"""For the recall model, which has but two layers."""


@dataclass(frozen=True, kw_only=True)
class Options:
    policies: list[str]
    tokens: int
    output: int
    batch: int
    requests: int
    fit: float
    repeats: int
    out: Path
    command: str
    turns: int = 0

    def __post_init__(self) -> None:
        if 0 < self.requests <= self.fit:
            raise ValueError(
                f"--requests {self.requests} all fit where {self.fit:g} do: ask for more, for a "
                "lower --fit, or for 0, which leaves that load out"
            )
        if self.batch > self.fit:
            raise ValueError(f"--batch {self.batch} is more than fit (--fit {self.fit:g})")
        if self.turns == 1:
            raise ValueError(
                "--turns 1 has no later turn: ask for two, or for 0, which leaves that load out"
            )

    @property
    def length(self) -> int:
        """Most tokens of a request."""
        later = max(self.turns - 1, 0) * (self.output + QUESTION_TOKENS)
        question = QUESTION_TOKENS if self.turns else 0
        return self.tokens + MARGIN + self.output + question + later


@dataclass(kw_only=True)
class Cell:
    """One load under one policy."""

    policy: str
    load: str
    sent: list[Sent] = field(default_factory=list)
    """Of each repeat."""
    preempted: list[int] = field(default_factory=list)
    peak: list[int | None] = field(default_factory=list)
    """KV blocks that requests held at most, as far as looking every tenth of a second shows; None
    where a load was over between two looks."""
    cached: list[float] = field(default_factory=list)
    """Share of later turns' prompts that was cached; of ``turns`` alone."""
    read: float = 1.0
    """Bytes that decode queries read, digests included, of those that lie behind them."""

    def of(self, measure: str) -> float:
        return median(getattr(sent, measure) for sent in self.sent)

    def range(self, measure: str) -> tuple[float, float]:
        found = [getattr(sent, measure) for sent in self.sent]
        return min(found), max(found)

    @property
    def does_nothing(self) -> bool:
        """A policy whose queries read all that dense's would."""
        return self.read == 1 and not parse(self.policy).is_dense

    @property
    def replies(self) -> list[str]:
        return [reply for sent in self.sent for reply in sent.replies]

    def as_dense(self, dense: Cell) -> float:
        """Mean share of a reply's words before the first that dense's has not."""
        return mean(map(agreement, self.replies, dense.replies))


def agreement(reply: str, wanted: str) -> float:
    words, expected = reply.split(), wanted.split()
    same = next(
        (n for n, (a, b) in enumerate(zip(words, expected, strict=False)) if a != b),
        min(len(words), len(expected)),
    )
    return same / max(len(words), len(expected), 1)


def sized(engine: Engine, length: int, fit: float, at_once: int) -> Engine:
    """With a pool that holds ``fit`` dense requests of so many tokens, their greatest length."""
    blocks = -(-length // engine.block_size)
    return replace(
        engine,
        kv_cache_mib=-(-(int(fit * blocks) + 2) * block_bytes(engine) // MiB),
        # vLLM refuses texts by their characters, of which words between spaces have more.
        max_model_len=length + length // 4,
        max_num_seqs=at_once,
    )


def block_bytes(engine: Engine) -> int:
    """Of all layers, without digests."""
    dtype = served_dtype(engine.model, engine.dtype)
    return engine.block_size * token_bytes(engine.model, dtype)


def run(options: Options, engine: Engine, console: Console, save: Callable[[Run], None]) -> Run:
    """Raises EngineError. ``save`` is called after every policy."""
    at_once = max(options.batch, options.requests)
    done = Run(options=options, engine=sized(engine, options.length, options.fit, at_once))
    with progress(console, len(options.policies)) as bar:
        for place, line in enumerate(options.policies):
            console.print(f"[bold cyan]{escape(line)}[/]")
            done.cells += _measure(line, place, done, console)
            done.provenance["load_at_end"] = os.getloadavg()[0]
            save(done)
            bar.advance()
    return done


@dataclass(kw_only=True)
class Run:
    options: Options
    engine: Engine
    cells: list[Cell] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.provenance = provenance(self.options.command, self.engine.package)

    def of(self, load: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.load == load]

    def dense(self, load: str) -> Cell:
        return next(cell for cell in self.of(load) if parse(cell.policy).is_dense)

    def as_json(self) -> str:
        options = {**asdict(self.options), "out": str(self.options.out)}
        whole = {
            "provenance": self.provenance,
            "settings": {**options, **self.engine.as_json()},
            "cells": [asdict(cell) for cell in self.cells],
        }
        return json.dumps(whole, indent=1) + "\n"


def _measure(line: str, place: int, run: Run, console: Console) -> Iterator[Cell]:
    options, engine = run.options, run.engine
    texts = prompts(engine.model, options.tokens)  # the same for every policy
    folder = options.out.parent / f"{options.out.stem}-logs"
    with serve(engine, str(parse(line)), folder / f"server-{place}.log") as server:

        def cell(load: str, sends: Sequence[Callable[[Path], tuple[Sent, float | None]]]) -> Cell:
            made, before = Cell(policy=line, load=load), state(engine, server.url)
            for repeat, send_all in enumerate(sends):
                preempted = state(engine, server.url).preempted
                with watching(engine, server.url, made.peak):
                    sent, cached = send_all(folder / f"{load}-{place}-{repeat}")
                made.sent.append(sent)
                made.cached += [] if cached is None else [cached]
                after = state(engine, server.url)
                made.preempted.append(after.preempted - preempted)
                console.print(
                    f"    {load}: {sent.output_tokens_per_second:.1f} tokens/s, a token every "
                    f"{sent.tpot_ms:.1f} ms, {made.preempted[-1]} preempted, blocks at the peak: "
                    f"{shown(made.peak[-1:])}"
                )
            if after.cached_bytes > before.cached_bytes:
                made.read = (after.read_bytes - before.read_bytes) / (
                    after.cached_bytes - before.cached_bytes
                )
            return made

        def at_once(batch: list[str], logs: Path) -> tuple[Sent, None]:
            load = Load(prompts=batch, at_once=len(batch), output=options.output)
            return send(load, engine, server.url, logs), None

        def talk(context: str, logs: Path) -> tuple[Sent, float]:
            load = Conversations(
                context=context, clients=options.batch, turns=options.turns, output=options.output
            )
            return converse(load, engine, server.url)

        same = list(islice(texts, options.batch))
        # Fills the prefix cache, and pays for what a server builds at first use.
        at_once(same, folder / f"first-{place}")
        yield cell(BATCH, [partial(at_once, same)] * options.repeats)
        if options.requests:
            new = [list(islice(texts, options.requests)) for _ in range(options.repeats)]
            yield cell(MEMORY, [partial(at_once, batch) for batch in new])
        if options.turns:
            yield cell(TURNS, [partial(talk, next(texts)) for _ in range(options.repeats)])


@contextlib.contextmanager
def watching(engine: Engine, url: str, peaks: list[int | None]) -> Iterator[None]:
    """The most blocks that requests held meanwhile join ``peaks``."""
    over, held = threading.Event(), [0]

    def watch() -> None:
        with contextlib.suppress(httpx.HTTPError):  # the load will say so
            while not over.wait(SAMPLE_SECONDS):
                held.append(state(engine, url).held)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        peaks.append(max(held) or None)


def shown(peaks: Sequence[int | None]) -> str:
    """The highest of them."""
    seen = [peak for peak in peaks if peak is not None]
    return f"{max(seen):,}" if seen else "unseen"


def state(engine: Engine, url: str) -> EngineState:
    answer = httpx.get(f"{url}/metrics", timeout=60)
    answer.raise_for_status()
    return engine.state(answer.text)
