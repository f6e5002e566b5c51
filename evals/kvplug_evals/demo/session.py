"""The demo from start to end: a server a policy, the conversation, the report."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.markup import escape

from kvplug import parse
from kvplug.shown import Bar, progress, write_json
from kvplug_evals.demo import report
from kvplug_evals.demo.conversation import (
    CLIENTS,
    SIZES,
    TURNS,
    Conversation,
    Sizes,
    conversation,
    documents,
)
from kvplug_evals.demo.measure import Row, hold
from kvplug_evals.demo.plot import draw
from kvplug_evals.served.choose import check_model, policies
from kvplug_evals.served.engine import Engine
from kvplug_evals.served.start import serve

POLICIES = {
    "vllm": (
        "twilight(budget=0.0625)",
        "streaming_llm(sinks=32, window=992)",
        "quest(budget=512)",
        "snapkv(budget=1024)",
        "snapkv(budget=1024) + quest(budget=512)",
    ),
    "sglang": (
        "twilight(budget=0.0625)",
        "streaming_llm(sinks=32, window=480)",
        "quest(budget=256)",
        "snapkv(budget=512)",
        "snapkv(budget=512) + quest(budget=256)",
    ),
}


def run_demo(
    lines: Sequence[str],
    engine: Engine,
    out: Path,
    console: Console,
    check: Callable[[], object] = lambda: None,
    sizes: Sizes | None = None,
    to: Path | None = None,
) -> None:
    """Raises EngineError, report.NothingSaved, ValueError and OSError; no server is left.

    ``sizes`` are the engine's of ``SIZES`` if None. ``to``: where the figures are written besides.

    ``check()`` is called again and again, and may raise to stop.
    """
    check_model(engine.model)
    compared = policies(lines or POLICIES[engine.package])
    out.mkdir(parents=True, exist_ok=True)
    talk = conversation(sizes or SIZES[engine.package])
    report.say_plan(console, talk, engine, len(compared))
    began = monotonic()
    rows = []
    with progress(console, len(compared) * (2 + TURNS)) as bar:
        for place, line in enumerate(compared, start=1):
            console.print(f"[bold]{place}/{len(compared)} [cyan]{escape(line)}[/]")
            log = out / f"server-{place}.log"
            rows.append(_converse(line, talk, engine, log, console, bar, check))
    result = report.Result(
        rows=rows,
        engine=engine,
        sizes=talk.sizes,
        machine=machine(engine.package),
        seconds=monotonic() - began,
    )
    report.say_result(console, result)
    plot, data = out / "demo.png", out / "demo.json"
    draw(result, plot)
    write_json(report.as_data(result), data)
    write_json(report.as_data(result), to)
    console.print(f"\n[bold]saved[/]  {plot}  {data}  {out}/server-*.log", soft_wrap=True)
    report.check_savings(rows)


def _converse(
    line: str,
    talk: Conversation,
    engine: Engine,
    log: Path,
    console: Console,
    bar: Bar,
    check: Callable[[], object],
) -> Row:
    bar.say(f"starting {engine.title}, log in {log}")
    with serve(engine, str(parse(line)), log, check) as server:
        bar.advance()
        row = Row(policy=line, is_dense=parse(line).is_dense, start_seconds=server.start_seconds)
        console.print(f"    server ready in {row.start_seconds:.0f} s")

        def sampled(held: int) -> None:
            check()
            turn = min(len(row.turns) + 1, TURNS)
            bar.say(f"turn {turn} of {TURNS}, {CLIENTS} clients, {held} blocks held")

        def turned() -> None:
            check()
            bar.advance()
            (report.say_documents if row.batch else report.say_turn)(console, row)

        asyncio.run(hold(engine, server.url, talk, documents(talk.sizes), row, sampled, turned))
        bar.say("stopping the server")
    return row


def machine(*packages: str) -> dict[str, str]:
    """Versions, of kvplug and torch too, and hardware, for the report."""
    names = ("kvplug", *packages, "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        **versions,
        "python": platform.python_version(),
        "cpu": f"{cores} cores of {_processor()}, {memory:.0f} GiB",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
