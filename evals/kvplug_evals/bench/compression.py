"""What compressing a prompt costs in a whole engine: steps of one request, dense and compressed.

An engine of its own process for each policy; the same prompt goes to dense and then to the policy,
pair by pair, and every step of the engine is timed. A prompt is packed in the step of the first
token behind it, so the cost is that step less an ordinary one, and it is held against the time to
first token of the same prompt with dense attention. Prompts are random and never used twice: no
prefix is cached.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvplug import parse
from kvplug.shown import progress
from kvplug_evals.bench.options import Clock
from kvplug_evals.bench.provenance import WIDTH, provenance, table
from kvplug_evals.models.folder import BUILD_MODELS

DENSE = "dense"
DECODES = 12  # steps behind the prompt: the first packs, the others are ordinary
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

    @property
    def cost(self) -> float:
        return self.packing - self.decode


def serve(line: str, options: Options, asked: Connection) -> None:
    """A worker: an engine that answers prompts with Steps until it is sent None."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(options.model), attention_backend="kvplug",
        additional_config={"kvplug": {"policy": line}}, enforce_eager=True,
        block_size=options.block_size, max_num_batched_tokens=options.chunk,
        max_model_len=options.tokens + DECODES + 1, max_num_seqs=1,
        kv_cache_memory_bytes=512 << 20, skip_tokenizer_init=True, async_scheduling=False,
    )  # fmt: skip
    engine = llm.llm_engine
    parameters = SamplingParams(
        temperature=0, max_tokens=DECODES + 1, ignore_eos=True, detokenize=False
    )
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    clock = process_time if options.clock is Clock.CPU else perf_counter
    asked.send("ready")
    number = 0
    while (prompt := asked.recv()) is not None:
        packed = sum(layer.impl.packed_prompts for layer in layers)
        engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        number += 1
        first = 0.0
        behind: list[float] = []
        while engine.has_unfinished_requests():
            began = clock()
            outputs = engine.step()
            took = (clock() - began) * 1e3
            if (first and behind) or (outputs and len(outputs[0].outputs[0].token_ids) > 1):
                behind.append(took)
            else:
                first += took
        assert len(behind) == DECODES, f"{len(behind)} steps behind the prompt"
        packed = sum(layer.impl.packed_prompts for layer in layers) - packed
        asked.send(
            Steps(first_token=first, packing=behind[0], decode=median(behind[1:]), packed=packed)
        )


class Engine:
    """A worker, seen from the process that asks."""

    def __init__(self, line: str, options: Options) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.asks, asked = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(line, options, asked), daemon=True)
        self.process.start()
        asked.close()
        assert self.answer() == "ready"

    def ask(self, prompt: list[int]) -> Steps:
        self.asks.send(prompt)
        return self.answer()

    def answer(self) -> Any:
        try:
            return self.asks.recv()
        except EOFError:
            raise RuntimeError("an engine ended, its reason is above") from None


@contextmanager
def engine(line: str, options: Options) -> Iterator[Engine]:
    started = Engine(line, options)
    try:
        yield started
    finally:
        started.process.terminate()
        started.process.join()


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
    with engine(DENSE, options) as dense, progress(console, pairs_in_all) as bar:
        for line in options.policies:
            bar.say(escape(line))
            with engine(line, options) as ours:
                pairs = []
                for _ in range(1 + options.repeats):
                    prompt = [source.randrange(vocabulary) for _ in range(options.tokens)]
                    pairs.append((dense.ask(prompt), ours.ask(prompt)))
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
