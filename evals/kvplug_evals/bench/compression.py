"""What compressing a prompt costs in a whole engine: steps of one request, dense and compressed.

An engine of its own process for each policy; the same prompt goes to dense and then to the policy,
pair by pair, and every step of the engine is timed. A prompt is packed in the step of the first
token behind it, so the cost is that step less an ordinary one, and it is held against the time to
first token of the same prompt with dense attention. Prompts are random and never used twice: no
prefix is cached.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvplug import parse
from kvplug.shown import progress
from kvplug_evals.bench.options import Clock
from kvplug_evals.bench.provenance import WIDTH, provenance, table
from kvplug_evals.bench.steps import DECODES, Timed, Worker, engine
from kvplug_evals.models.folder import BUILD_MODELS

DENSE = "dense"
CLAIM = 0.05


@dataclass(frozen=True, kw_only=True)
class Options:
    policies: list[str]
    model: Path
    tokens: int
    chunk: int
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
        for line in self.policies:
            scored = parse(line).scored
            if scored is None:
                raise ValueError(f"{line} compresses no prompt; give one such as 'snapkv'")
            if self.tokens <= scored.pages(self.block_size) * self.block_size:
                raise ValueError(
                    f"prompts of {self.tokens:,} tokens are within {line}: nothing would be "
                    "compressed; raise --tokens"
                )


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Of one request, in milliseconds."""

    first_token: float
    """All steps of the prefill."""
    packing: float
    """The step behind it, which packs."""
    decode: float
    """Median of the steps behind that one."""
    packed: int
    """Layers that packed it."""

    @classmethod
    def of(cls, timed: Timed) -> Steps:
        """The first step behind a prompt packs, the others are ordinary."""
        packing, *others = timed.behind
        return cls(
            first_token=timed.first_token, packing=packing, decode=median(others),
            packed=timed.packed,
        )  # fmt: skip

    @property
    def cost(self) -> float:
        return self.packing - self.decode


@dataclass(frozen=True, kw_only=True)
class Result:
    policy: str
    pairs: list[tuple[Steps, Steps]]
    """Dense and compressed, of the same prompt."""

    def of_dense(self, field: str) -> float:
        return median(getattr(dense, field) for dense, _ in self.pairs)

    def of_policy(self, field: str) -> float:
        return median(getattr(ours, field) for _, ours in self.pairs)

    @property
    def shares(self) -> list[float]:
        """Cost of compression, of dense's time to first token."""
        return sorted(ours.cost / dense.first_token for dense, ours in self.pairs)

    @property
    def slower_prefill(self) -> float:
        """Time to first token as a multiple of dense's."""
        return median(ours.first_token / dense.first_token for dense, ours in self.pairs)

    @property
    def holds(self) -> bool:
        return median(self.shares) <= CLAIM

    def as_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "cost_of_ttft": median(self.shares),
            "cost_of_ttft_range": [self.shares[0], self.shares[-1]],
            "ttft_ratio": self.slower_prefill,
            "holds": self.holds,
            "pairs": [[asdict(dense), asdict(ours)] for dense, ours in self.pairs],
        }


def measure(options: Options, console: Console) -> list[Result]:
    """Raises ValueError where a prompt was not compressed, RuntimeError where an engine ended."""
    results, source = [], random.Random(0)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    pairs_in_all = len(options.policies) * (1 + options.repeats)
    how = Worker(
        model=options.model, tokens=options.tokens, chunk=options.chunk,
        block_size=options.block_size, kv_cache_mib=512, clock=options.clock,
    )  # fmt: skip
    with engine(DENSE, how) as dense, progress(console, pairs_in_all) as bar:
        for line in options.policies:
            bar.say(escape(line))
            with engine(line, how) as ours:
                pairs = []
                for _ in range(1 + options.repeats):
                    prompt = [source.randrange(vocabulary) for _ in range(options.tokens)]
                    pairs.append((Steps.of(dense.ask(prompt)), Steps.of(ours.ask(prompt))))
                    bar.advance()
            if not all(steps.packed for _, steps in pairs) or any(s.packed for s, _ in pairs):
                raise ValueError(f"{line} did not compress every prompt")
            results.append(Result(policy=line, pairs=pairs[1:]))
    return results


def show(results: list[Result], source: dict[str, Any], options: Options, to: Console) -> None:
    to.print(
        f"[bold]{escape(source['command'])}[/]\n{source['date']}, commit {source['commit']}, "
        f"vLLM {source['vllm']}, torch {source['torch']}, {source['cpu']}, {options.threads} "
        f"threads of {source['cores']} cores, {options.clock} clock, load "
        f"{source['load_at_start']:.1f} to {source['load_at_end']:.1f}\n"
    )
    made = table(
        f"{options.tokens:,}-token prompts, chunks of {options.chunk}, blocks of "
        f"{options.block_size}: milliseconds, medians of {options.repeats} pairs",
        ["policy", "TTFT dense", "TTFT", "packing", "decode", "cost", "of TTFT", "range"],
    )
    for result in results:
        shares = result.shares
        made.add_row(
            result.policy,
            f"{result.of_dense('first_token'):,.0f}", f"{result.of_policy('first_token'):,.0f}",
            f"{result.of_policy('packing'):.0f}", f"{result.of_policy('decode'):.0f}",
            f"{result.of_policy('cost'):.0f}", f"[bold]{median(shares):.1%}[/]",
            f"{shares[0]:.1%} to {shares[-1]:.1%}", style=None if result.holds else "red",
        )  # fmt: skip
    to.print(made)
    above = sum(not result.holds for result in results)
    to.print(f"{above} of {len(results)} policies cost more than {CLAIM:.0%} of dense's TTFT.")
    busy = max(source["load_at_start"], source["load_at_end"]) > source["cores"]
    if busy and options.clock is Clock.WALL:
        to.print(
            "[red]Others used this machine: measure again, or with --threads 1 --clock cpu.[/]"
        )
    to.print(
        "Cost: the step of the first token behind the prompt, which packs, less the median of the "
        f"{DECODES - 1} steps behind it. Dense and compressed in turn, the same prompt."
    )


def run(options: Options, console: Console) -> list[Result]:
    """Measures, shows, and keeps JSON and text."""
    source = provenance(options.command, "vllm")
    results = measure(options, console)
    source["load_at_end"] = os.getloadavg()[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(options), "model": str(options.model), "out": str(options.out)}
    data = {
        "provenance": source,
        "settings": settings,
        "policies": [result.as_json() for result in results],
    }
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    console.width = max(console.width, WIDTH)
    show(results, source, options, console)
    with options.out.with_suffix(".txt").open("w") as file:
        show(results, source, options, Console(file=file, width=WIDTH, highlight=False))
    return results
