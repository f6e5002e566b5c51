"""Results as a table and as JSON with its provenance."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvplug_evals.bench.attention import EVICTED_BYTES, WARM_UP, Result, describe
from kvplug_evals.bench.layer import Shape
from kvplug_evals.bench.options import Options
from kvplug_evals.bench.provenance import WIDTH, table
from kvplug_evals.bench.provenance import provenance as of_run

METHOD = (
    "One layer, one decode step: write the new token, attend. vLLM's own layer, builder and "
    "allocation on both sides, stock on an unpadded cache; the same keys, queries and block "
    f"table. Stock and the policy in turn in one process, {WARM_UP} pairs to warm up, a new "
    f"query each, {EVICTED_BYTES >> 20} MiB of other memory read before each call. Ratios are of "
    "pairs. best: bytes that stock reads by bytes that the policy must. Parts are of separate "
    "pairs. plan: once a step for all layers, not in the ratio."
)


class Run:
    """One run of the bench, saved as it grows."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.results: list[tuple[str, Result]] = []
        self.left_out: list[tuple[str, Shape, str]] = []
        self.provenance = provenance(options)

    def add(self, heads: str, result: Result) -> None:
        self.results.append((heads, result))

    def leave_out(self, heads: str, shape: Shape, reason: str) -> None:
        self.left_out.append((heads, shape, reason))

    def save(self) -> None:
        out = self.options.out
        out.parent.mkdir(parents=True, exist_ok=True)
        self.provenance["load_at_end"] = os.getloadavg()[0]
        data = {
            "provenance": self.provenance,
            "method": METHOD,
            "cells": [cell(heads, result, self.options.policy) for heads, result in self.results],
            "left_out": [
                {**shape_of(heads, shape), "reason": reason}
                for heads, shape, reason in self.left_out
            ],
        }
        out.write_text(json.dumps(data, indent=1) + "\n")

    def finish(self) -> None:
        """The tables, on the screen and as text beside the JSON."""
        screen = Console(highlight=False)
        self.print_to(Console(highlight=False, width=max(screen.width, WIDTH)))
        with self.options.out.with_suffix(".txt").open("w") as file:
            self.print_to(Console(file=file, width=WIDTH, highlight=False))

    def print_to(self, console: Console) -> None:
        source, options = self.provenance, self.options
        console.print(
            f"[bold]{source['command']}[/]\n{source['date']}, commit {source['commit']}, "
            f"vLLM {source['vllm']}, torch {source['torch']}, {source['cpu']}, "
            f"{options.threads} threads of {source['cores']} cores, {options.clock} clock, "
            f"pages {options.pages}, load {source['load_at_start']:.1f} to "
            f"{source['load_at_end']:.1f}\n"
        )
        console.print(ratio_table(self.results, options))
        console.print(parts_table(self.results, options))
        for _, shape, reason in self.left_out:
            console.print(f"[red]left out: {describe(shape)}: {reason}[/]")
        if max(source["load_at_start"], source["load_at_end"]) > source["cores"]:
            console.print(
                "[red]Others used this machine. Threads that wait for one another then wait for "
                "them too: measure again, or with --threads 1 --clock cpu.[/]"
            )
        losing = sum(result.loses for _, result in self.results)
        console.print(f"{losing} of {len(self.results)} cells lose. {METHOD}")


def ratio_table(results: list[tuple[str, Result]], options: Options) -> Table:
    policy = options.policy
    made = table(
        f"stock CPU_ATTN / {options.line}, medians of {options.repeats}",
        ["heads", "dtype", "isa", "B", "tokens", "stock ms", f"{policy} ms", "ratio",
         "p20 to p80", "best", "of best"],
        left=2,
    )  # fmt: skip
    for heads, r in results:
        made.add_row(
            *lead(heads, r.shape, r.isa),
            f"{r.stock.median:.2f}",
            f"{r.ours.median:.2f}",
            f"[bold]{r.ratio.median:.2f}[/]",
            f"{r.ratio.p20:.2f} to {r.ratio.p80:.2f}",
            f"{r.best_ratio:.1f}",
            f"{r.of_best:.0%}",
            style="red" if r.loses else None,
        )
    return made


def parts_table(results: list[tuple[str, Result]], options: Options) -> Table:
    names = list(results[0][1].parts) if results else []
    made = table(
        f"milliseconds of the parts of a step with {options.policy}",
        ["heads", "dtype", "isa", "B", "tokens", *names, "plan", "stock plan"],
        left=2,
    )
    for heads, r in results:
        made.add_row(
            *lead(heads, r.shape, r.isa),
            *(f"{r.parts[name].median:.2f}" for name in names),
            f"{r.plan_ours.median:.2f}",
            f"{r.plan_stock.median:.2f}",
        )
    return made


def lead(heads: str, shape: Shape, isa: str) -> list[str]:
    dtype = str(shape.dtype).removeprefix("torch.")
    return [heads, dtype, isa, str(shape.B), f"{shape.T:,}"]


def cell(heads: str, r: Result, policy: str) -> dict[str, Any]:
    return {
        **shape_of(heads, r.shape),
        "isa": r.isa,
        "repeats": r.repeats,
        "stock_ms": asdict(r.stock),
        f"{policy}_ms": asdict(r.ours),
        "ratio": asdict(r.ratio),
        "best_ratio": r.best_ratio,
        "share_of_best": r.of_best,
        "loses": r.loses,
        "parts_ms": {name: asdict(spread) for name, spread in r.parts.items()},
        "plan_ms": {"stock": asdict(r.plan_stock), policy: asdict(r.plan_ours)},
        "cache_bytes": {"stock": r.stock_bytes, policy: r.ours_bytes},
        "checked": r.errors,
    }


def shape_of(heads: str, shape: Shape) -> dict[str, Any]:
    return {
        "heads": {"name": heads, "query": shape.Hq, "kv": shape.H, "dim": shape.D},
        "dtype": str(shape.dtype).removeprefix("torch."),
        "batch": shape.B,
        "context": shape.T,
        "block_size": shape.S,
    }


def provenance(options: Options) -> dict[str, Any]:
    return {
        **of_run(options.command, "vllm"),
        "policy": options.line,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "clock": options.clock,
        "pages": options.pages,
    }
