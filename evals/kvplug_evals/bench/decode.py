"""Decode steps of whole engines: what ``kvplug plan --pace`` knows of a machine, and how far off.

One engine serves dense, and beside it, one after the other, each method has its own, whose
requests choose their budgets. The same prompts go to both in turn, and a line's step is dense's,
of all its turns, times the median ratio of neighbours, as other work on a machine slows both.
``kvplug.advice.pace`` is fitted to the lengths of ``--fit`` by least squares of relative errors,
none of its rates below 0, and says what steps at the lengths of ``--judge`` take before they are
compared. Prompts are random; each is read once, and found again in the prefix cache.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from scipy.optimize import nnls

from kvplug import parse, read_offer
from kvplug.advice.bounds import Reads, Setup, Traffic
from kvplug.advice.card import Card
from kvplug.advice.model import Model, read_model
from kvplug.advice.pace import Choosing, Pace, StepBytes, reader, shape_of
from kvplug.shown import progress
from kvplug_evals.bench.options import Clock
from kvplug_evals.bench.provenance import provenance, save_with_table, table
from kvplug_evals.bench.steps import DECODES, Engine, Worker, engine
from kvplug_evals.models.folder import BUILD_MODELS, served_dtype, token_bytes

DENSE = "dense"
LINES = (
    "quest(budget=0.125)", "quest(budget=0.25)", "twilight(budget=0.0625)",
    "twilight(budget=0.15625)",
)  # fmt: skip
"""Two budgets of each method: what is read and what it is chosen by then grow apart."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CLAIM = 0.25


@dataclass(frozen=True, kw_only=True)
class Options:
    policies: Sequence[str]
    """Beside dense."""
    model: Path
    fit: Sequence[int]
    judge: Sequence[int]
    batch: int
    """Requests of one cell more at the shortest length of either."""
    dtype: str
    block_size: int
    repeats: int
    threads: int
    clock: Clock
    out: Path
    command: str

    def __post_init__(self) -> None:
        if self.clock is Clock.CPU and self.threads > 1:
            raise ValueError("the clock cpu is that of one thread: add --threads 1")
        if not (self.model / "config.json").exists():
            raise ValueError(f"there is no model in {self.model}; {BUILD_MODELS}, or --model")
        if len(set(self.fit)) < 2:
            raise ValueError(
                f"--fit needs two lengths or more, as a rate is of their difference, got "
                f"{list(self.fit)}; write --fit 1024 --fit 6144"
            )
        if both := set(self.fit) & set(self.judge):
            raise ValueError(
                f"{min(both):,} tokens are to be fitted and judged; name other lengths for --judge"
            )
        for line in self.policies:
            policy = parse(line)
            if policy.format is not None or policy.selector is None or len(list(policy)) > 1:
                raise ValueError(
                    f"{line} is no selector alone, over plain pages; leave it out (what evicts "
                    "decodes at dense's pace)"
                )
            for load in self.fitted:
                if not reads(self, line, load).decode().choosing:
                    raise ValueError(
                        f"{line} chooses in no layer of {self.model} at {load.tokens:,} tokens; "
                        "raise --fit, or write a smaller budget, or dense_layers=0"
                    )

    @property
    def methods(self) -> dict[str, list[str]]:
        """Lines that one engine serves."""
        found: dict[str, list[str]] = {}
        for line in self.policies:
            found.setdefault(str(reader(parse(line))), []).append(line)
        return found

    @property
    def fitted(self) -> list[Load]:
        return [*(Load(tokens) for tokens in self.fit), Load(min(self.fit), self.batch)]

    @property
    def judged(self) -> list[Load]:
        if not self.judge:
            return []
        return [*(Load(tokens) for tokens in self.judge), Load(min(self.judge), self.batch)]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[served_dtype(self.model, self.dtype)]

    @property
    def worker(self) -> Worker:
        dtype = served_dtype(self.model, self.dtype)
        longest = max(*self.fit, *self.judge)
        others = (self.batch - 1) * max(min(x) for x in (self.fit, self.judge) if x)
        held = longest + others + self.batch * (DECODES + 2 * self.block_size)
        return Worker(
            model=self.model, tokens=longest, chunk=2048, block_size=self.block_size,
            kv_cache_mib=max(16, held * token_bytes(self.model, dtype) * 3 // 2 >> 20),
            clock=self.clock, dtype=dtype, at_once=self.batch,
        )  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Requests that decode together behind prompts of so many tokens."""

    tokens: int
    at_once: int = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Seconds of a step."""

    policy: str
    load: Load
    measured: float
    read: StepBytes


@dataclass(kw_only=True)
class Run:
    options: Options
    cells: list[Cell] = field(default_factory=list)
    prompt: tuple[float, float] = (0.0, 0.0)
    """Multiplications of dense's longest prompt, and its seconds."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.provenance = provenance(self.options.command, "vllm")

    @cached_property
    def pace(self) -> Pace:
        """Of the fitted cells alone. Raises ValueError where they say too little."""
        options, loads = self.options, self.options.fitted
        model = replace(read_model(options.model), itemsize=options.itemsize)
        return fit(
            [cell for cell in self.cells if cell.load in loads],
            model=model, block_size=options.block_size,
            arithmetic=self.prompt[0] / self.prompt[1], source=str(options.out),
        )  # fmt: skip

    def planned(self, cell: Cell) -> float:
        return self.pace.step(reader(parse(cell.policy)), cell.load.at_once, cell.read)

    def off(self, cell: Cell) -> float:
        return self.planned(cell) / cell.measured - 1

    @property
    def worst(self) -> float:
        """Of the judged cells."""
        loads = self.options.judged
        return max((abs(self.off(x)) for x in self.cells if x.load in loads), default=0.0)

    def as_json(self) -> str:
        options, pace = self.options, asdict(self.pace)
        pace.pop("source")
        settings = {**asdict(options), "model": str(options.model), "out": str(options.out)}
        cells = [
            {
                **asdict(cell), "planned": self.planned(cell), "off": self.off(cell),
                "fitted": cell.load in options.fitted,
            }
            for cell in self.cells
        ]  # fmt: skip
        whole = {
            "provenance": self.provenance, "settings": settings, "pace": pace, "cells": cells,
            "worst": self.worst,
        }  # fmt: skip
        return json.dumps(whole, indent=1) + "\n"


def fit(
    cells: Sequence[Cell], *, model: Model, block_size: int, arithmetic: float, source: str
) -> Pace:
    """Dense's three rates, then each method's three of what is left. Raises ValueError."""

    def solved(part: Sequence[Cell], rows: list[list[float]], left: list[float]) -> list[float]:
        scale = np.array([[cell.measured] for cell in part])
        columns = np.abs(np.array(rows)).max(0).clip(1e-300)  # bytes beside ones: as large
        found, _ = nnls(np.array(rows) / columns / scale, np.array(left) / scale[:, 0])
        return (found / columns).tolist()

    dense = [cell for cell in cells if not cell.read.choosing]
    rows = [[1.0, x.load.at_once, x.load.at_once * x.read.whole] for x in dense]
    fixed, each, whole = solved(dense, rows, [x.measured for x in dense])
    if not whole:
        raise ValueError(
            "dense's steps did not grow with what they read: other work disturbed them, or --fit "
            "is too short; write --fit 1024 --fit 6144, --threads 1 and --clock cpu"
        )
    pace = Pace(
        source=source, model=shape_of(model), itemsize=model.itemsize, block_size=block_size,
        fixed=fixed, each=each, whole=whole, arithmetic=arithmetic, methods={},
    )  # fmt: skip
    methods = {}
    for name in sorted({str(reader(parse(x.policy))) for x in cells if x.read.choosing}):
        own = [x for x in cells if x.read.choosing and reader(parse(x.policy)) == name]
        rows, left = [], []
        for x in own:
            n, read = x.load.at_once, x.read
            rows.append([read.choosing, n * read.chosen, n * read.scanned])
            left.append(x.measured - pace.step(None, n, StepBytes(whole=read.whole)))
        layer, chosen, scanned = solved(own, rows, left)
        methods[name] = Choosing(layer=layer, chosen=chosen, scanned=scanned)
    return replace(pace, methods=methods)


def reads(options: Options, policy: str, load: Load) -> Reads:
    """Of a request in the middle of its timed steps."""
    setup = Setup(
        card=Card(name="", memory=0, bandwidth=1), pool=0, block_size=options.block_size,
        chunk=options.worker.chunk,
    )  # fmt: skip
    traffic = Traffic(prompt=load.tokens, answer=DECODES, at_once=load.at_once)
    offer = read_offer({"policy": policy}, environ={})
    return Reads(read_model(options.model), setup, traffic, offer, options.itemsize)


def run(options: Options, console: Console, save: Callable[[Run], None]) -> Run:
    """Measures. Raises ValueError, and RuntimeError where an engine ended."""
    done, how, source = Run(options=options), options.worker, random.Random(0)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    prompts = [
        [source.randrange(vocabulary) for _ in range(how.tokens)] for _ in range(options.batch)
    ]
    loads = list(dict.fromkeys([*options.fitted, *options.judged]))
    of_dense: dict[Load, list[float]] = {load: [] for load in loads}
    ratios: dict[tuple[str, Load], list[float]] = {}

    def ask(served: Engine, load: Load, policy: str | None = None) -> float:
        asked = [prompt[: load.tokens] for prompt in prompts[: load.at_once]]
        return median(served.ask(*asked, policy=policy).behind) / 1e3

    with (
        engine(DENSE, how) as dense,
        progress(console, len(options.policies) * (1 + options.repeats)) as bar,
    ):
        first = dense.ask(prompts[0]).first_token / 1e3
        done.prompt = reads(options, DENSE, Load(how.tokens)).prompt_work()[1], first
        for name, lines in options.methods.items():
            bar.say(escape(f"starting {name}"))
            with engine(lines[0], replace(how, allow=(name,))) as ours:
                ours.ask(prompts[0])
                for repeat in range(1 + options.repeats):  # the first fills the prefix caches
                    for line in lines:
                        bar.say(escape(line))
                        for load in loads:
                            before, after = ask(dense, load), ask(ours, load, line)
                            if repeat:
                                of_dense[load].append(before)
                                ratios.setdefault((line, load), []).append(after / before)
                        bar.advance()
    for line in (DENSE, *options.policies):
        for load in loads:
            ratio = 1.0 if line == DENSE else median(ratios[line, load])
            read = reads(options, line, load).decode()
            seconds = median(of_dense[load]) * ratio
            done.cells.append(Cell(policy=line, load=load, measured=seconds, read=read))
    done.provenance["load_at_end"] = os.getloadavg()[0]
    save(done)
    return done


def save(run: Run) -> None:
    """JSON, and beside it the table."""
    save_with_table(run.options.out, run.as_json(), partial(show, run))


def show(run: Run, console: Console) -> None:
    options, source, pace = run.options, run.provenance, run.pace
    console.print(
        f"[bold]{escape(source['command'])}[/]\n{source['date']}, commit {source['commit']}, "
        f"vLLM {source['vllm']}, torch {source['torch']}, {source['cpu']}, {options.threads} "
        f"threads of {source['cores']} cores, {options.clock} clock, load "
        f"{source['load_at_start']:.1f} to {source['load_at_end']:.1f}\n",
        soft_wrap=True,
    )
    made = table(
        f"{options.model.name}, {options.worker.dtype}, blocks of {options.block_size}: a decode "
        f"step, medians of {options.repeats} pairs with dense",
        ["policy", "tokens", "at once", "measured ms", "planned ms", "off", ""],
    )
    for cell in run.cells:
        fitted, off = cell.load in options.fitted, run.off(cell)
        made.add_row(
            cell.policy, f"{cell.load.tokens:,}", str(cell.load.at_once),
            f"{1e3 * cell.measured:.1f}", f"{1e3 * run.planned(cell):.1f}", f"{off:+.0%}",
            "fitted" if fitted else "judged",
            style="dim" if fitted else "red" if abs(off) > CLAIM else None,
        )  # fmt: skip
    console.print(made)
    console.print(
        f"a step: {1e3 * pace.fixed:.1f} ms, {1e3 * pace.each:.2f} a request, "
        f"{1e9 * pace.whole:.3f} ns a byte of cache read whole", soft_wrap=True
    )  # fmt: skip
    for name, method in pace.methods.items():
        console.print(
            f"{name}: {1e6 * method.layer:.0f} us a layer that chooses, {1e9 * method.chosen:.3f} "
            f"ns a byte read, {1e9 * method.scanned:.3f} ns a byte that it chooses by",
            soft_wrap=True,
        )
    console.print(
        f"Judged cells are off by at most {run.worst:.0%}. kvplug plan MODEL --pace {options.out}",
        soft_wrap=True,
    )
