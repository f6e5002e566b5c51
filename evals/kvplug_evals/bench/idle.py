"""Sessions that lie idle: what a server keeps of each, and what its next turn waits for.

Each session has a context of its own and a first turn. While it lies idle the others' contexts
push it out of the pool; then all ask a second turn, in another order. Every server has a pool of
the same bytes and, where pages go to host memory at all, host memory of the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvplug import parse
from kvplug.shown import progress
from kvplug_evals.bench.prompts import MARGIN, prompts
from kvplug_evals.bench.provenance import heading, provenance, save_with_table, table
from kvplug_evals.bench.serve import agreement, block_bytes, sized, state
from kvplug_evals.bench.turns import QUESTION_TOKENS, Conversations
from kvplug_evals.served.client import Client, Completion
from kvplug_evals.served.engine import Engine, MiB
from kvplug_evals.served.start import serve
from kvplug_evals.served.vllm import VLLM

CASES = (
    "dense on plain",
    "dense on kivi(bits=8)",
    "dense on kivi(bits=4)",
    "twilight(dense_layers=0) on kivi(bits=8)",
    "kivi(bits=4)",
    "snapkv(budget=512)",
)
"""Beside dense without host memory; for the recall model, which has but two layers."""
ON = " on "


@dataclass(frozen=True, kw_only=True)
class Case:
    """One server."""

    policy: str
    host: str | None
    """Of ``VLLM.host``."""

    @classmethod
    def read(cls, line: str) -> Case:
        """'POLICY on HOST', or a policy alone. Raises ValueError for a bad policy line."""
        policy, _, host = line.partition(ON)
        return cls(policy=str(parse(policy)), host=host.strip() or None)

    def __str__(self) -> str:
        return self.policy if self.host is None else f"{self.policy}{ON}{self.host}"


@dataclass(frozen=True, kw_only=True)
class Options:
    cases: Sequence[Case]
    sessions: int
    tokens: int
    output: int
    fit: float
    host_fit: float
    out: Path
    command: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sessions < 2 * self.fit:
            raise ValueError(
                f"--sessions {self.sessions} do not push each other out of a pool that holds "
                f"{self.fit:g}; ask for {int(2 * self.fit)} or more, or for a lower --fit"
            )
        if self.host_fit < 1:
            raise ValueError(
                f"--host-fit must be the plain sessions that the host holds, one or more, got "
                f"{self.host_fit:g}"
            )

    @property
    def length(self) -> int:
        """Most tokens of a request."""
        return self.tokens + MARGIN + 2 * self.output + QUESTION_TOKENS


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What one server did."""

    held_mib: float
    """Of the pool, that idle sessions hold so that nobody else can have it."""
    host_mib: float
    """Of host memory, that a session's context took when it was stored."""
    room: float
    """Sessions that the host holds at that size; 0 where there is none."""
    cached: float
    """Share of second turns' prompts."""
    loaded_mib: float
    """That came back from the host, of all second turns."""
    ttft_ms: float
    """Of second turns, median."""
    replies: list[str] = field(repr=False)
    """First and second turns', by session."""


@dataclass(kw_only=True)
class Run:
    options: Options
    engine: Engine
    host_mib: int
    turns: list[Turns] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.provenance = provenance(self.options.command, self.engine.package)

    def as_dense(self, turns: Turns) -> float:
        """Mean share of a reply's words before the first that the first server's has not."""
        return mean(map(agreement, turns.replies, self.turns[0].replies))

    def as_json(self) -> str:
        options = {**asdict(self.options), "out": str(self.options.out)}
        done = zip(self.options.cases, self.turns, strict=False)
        whole = {
            "provenance": self.provenance,
            "settings": {**options, **self.engine.as_json(), "host_mib": self.host_mib},
            "servers": [{"case": str(case), **asdict(turns)} for case, turns in done],
        }
        return json.dumps(whole, indent=1) + "\n"


def cases(lines: Sequence[str]) -> list[Case]:
    """Dense without host memory first, none twice. Raises ValueError."""
    return list(dict.fromkeys(map(Case.read, ["dense", *lines])))


def run(options: Options, engine: Engine, console: Console, save: Callable[[Run], None]) -> Run:
    """Raises EngineError. ``save`` is called after every server."""
    if not isinstance(engine, VLLM):
        raise ValueError(
            f"{engine.title} has no host memory that kvplug knows of; leave --engine out"
        )
    sized_ = sized(engine, options.length, options.fit, 1)
    blocks = -(-options.length // engine.block_size)
    host_mib = -(-int(options.host_fit * blocks) * block_bytes(engine) // MiB)
    done = Run(options=options, engine=sized_, host_mib=host_mib)
    with progress(console, len(options.cases)) as bar:
        for place, case in enumerate(options.cases):
            console.print(f"[bold cyan]{escape(str(case))}[/]")
            done.turns.append(_measure(case, place, done))
            done.provenance["load_at_end"] = os.getloadavg()[0]
            save(done)
            bar.advance()
    return done


def _measure(case: Case, place: int, run: Run) -> Turns:
    options, host = run.options, run.host_mib if case.host else 0
    engine = replace(run.engine, host=case.host, host_mib=host)  # type: ignore[call-arg]
    contexts = list(islice(prompts(engine.model, options.tokens), options.sessions))
    log = options.out.parent / f"{options.out.stem}-logs" / f"server-{place}.log"
    with serve(engine, case.policy, log) as server:
        first = asyncio.run(_ask(contexts, options.output, engine, server.url))
        idle = state(engine, server.url)
        asked = [
            f"{context}{answer.text} {question(context, options.output)}"
            for context, answer in zip(contexts, first, strict=True)
        ]
        order = list(range(options.sessions))
        random.Random(options.seed).shuffle(order)
        found = asyncio.run(_ask([asked[n] for n in order], options.output, engine, server.url))
        after = state(engine, server.url)
    second = [found[order.index(n)] for n in range(options.sessions)]
    each = idle.stored / options.sessions
    return Turns(
        held_mib=idle.held * block_bytes(engine) / MiB,
        host_mib=each / MiB,
        room=host * MiB / each if each else 0,
        cached=sum(a.cached_tokens for a in second) / sum(a.prompt_tokens for a in second),
        loaded_mib=after.loaded / MiB,
        ttft_ms=1000 * median(answer.first_token_seconds for answer in second),
        replies=[answer.text for answer in (*first, *second)],
    )


def question(context: str, output: int) -> str:
    return Conversations(context=context, clients=1, turns=2, output=output).question(0, 1)


async def _ask(texts: Sequence[str], output: int, engine: Engine, url: str) -> list[Completion]:
    """One after the other."""
    async with Client.of(engine, url) as client:
        return [await client.complete(text, output) for text in texts]


def save(run: Run) -> None:
    """JSON, and beside it the table."""
    save_with_table(run.options.out, run.as_json(), partial(show, run))


def show(run: Run, console: Console) -> None:
    options, engine = run.options, run.engine
    console.print(
        heading(run.provenance, engine)
        + f"{engine.model.name}, {engine.dtype}, {options.sessions} sessions of "
        f"{options.tokens:,} tokens, answers of {options.output}, blocks of {engine.block_size}, "
        f"{engine.kv_cache_mib:,} MiB of pool, which hold {options.fit:g} dense sessions, and "
        f"{run.host_mib:,} MiB of host memory, which hold {options.host_fit:g}\n",
        soft_wrap=True,
    )
    made = table(
        "a second turn, after the other sessions' contexts",
        ["policy on host memory", "held", "host each", "host holds", "cached", "loaded", "TTFT ms",
         "as dense"],
    )  # fmt: skip
    made.columns[0].no_wrap, made.columns[0].min_width = False, 24
    for case, turns in zip(options.cases, run.turns, strict=False):
        made.add_row(
            str(case).replace(ON, "\non "),
            f"{turns.held_mib:.1f}",
            f"{turns.host_mib:.2f}" if case.host else "",
            f"{turns.room:.1f}" if case.host else "",
            f"{turns.cached:.0%}",
            f"{turns.loaded_mib:.1f}" if case.host else "",
            f"{turns.ttft_ms:,.0f}",
            f"{run.as_dense(turns):.0%}",
        )
    console.print(made)
    console.print(
        "held: MiB of the pool that idle sessions hold, so that no other may have it; host each: "
        "MiB that a session's context took there, by the engine's own counter; host holds: so "
        "many sessions; cached: share of second turns' prompts, from the pool or the host; "
        "loaded: MiB that came back from the host; TTFT: of second turns, median, of a machine "
        "with the load named above; as dense: share of an answer's words before the first that "
        "the first server's has not, mean. plain: pages as they are, through vLLM's "
        "OffloadingConnector; its own copy wants a GPU.",
        soft_wrap=True,
    )
