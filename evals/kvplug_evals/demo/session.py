"""The demo from start to end: a server a policy, the conversation, the report."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvplug import parse
from kvplug_evals.demo import report
from kvplug_evals.demo.conversation import CLIENTS, TURNS, Conversation, conversation, documents
from kvplug_evals.demo.measure import Row, hold
from kvplug_evals.demo.plot import draw
from kvplug_evals.demo.server import ServerOptions, serve

POLICIES = (
    "dense",
    "streaming_llm(sinks=32, window=992)",
    "quest(budget=512)",
    "snapkv(budget=1024)",
    "snapkv(budget=1024) + quest(budget=512)",
)


def policies(lines: Sequence[str]) -> list[str]:
    """The lines to compare, dense first, none twice. Raises ValueError for a bad line."""
    named = {parse(line): line.strip() for line in reversed(["dense", *(lines or POLICIES)])}
    return list(reversed(named.values()))


def check_engine(engine: str) -> None:
    """Raises ValueError that says what to do."""
    if engine == "sglang":
        raise ValueError("the demo measures vLLM's servers alone so far; use --engine vllm")
    if engine != "vllm":
        raise ValueError(f"--engine must be vllm, got {engine!r}")
    if find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed here; run make demo, or pip install 'kvplug[vllm]'"
        )


def check_model(model: Path) -> None:
    """Raises FileNotFoundError that says how to get one."""
    if not (model / "config.json").exists():
        raise FileNotFoundError(f"there is no model in {model}; run make models, or give --model")


def run_demo(lines: Sequence[str], options: ServerOptions, out: Path, console: Console) -> None:
    """Raises ServerError, report.NothingSaved, ValueError and OSError; no server is left."""
    check_model(options.model)
    compared = policies(lines)
    out.mkdir(parents=True, exist_ok=True)
    talk = conversation()
    report.say_plan(console, talk, options, len(compared))
    began = monotonic()
    rows = []
    with _progress(console, len(compared) * (2 + TURNS)) as progress:
        for place, line in enumerate(compared, start=1):
            console.print(f"[bold]{place}/{len(compared)} [cyan]{escape(line)}[/]")
            log = out / f"server-{place}.log"
            rows.append(_converse(line, talk, options, log, console, progress))
    result = report.Result(
        rows=rows, options=options, seconds=monotonic() - began, machine=machine("vllm")
    )
    report.say_result(console, result)
    plot, data = out / "demo.png", out / "demo.json"
    draw(result, plot)
    data.write_text(report.as_json(result))
    console.print(f"\n[bold]saved[/]  {plot}  {data}  {out}/server-*.log", soft_wrap=True)
    report.check_savings(rows)


def _converse(
    line: str,
    talk: Conversation,
    options: ServerOptions,
    log: Path,
    console: Console,
    progress: Progress,
) -> Row:
    task = progress.task_ids[0]

    def show(what: str) -> None:
        progress.update(task, description=what)

    show(f"starting vllm serve, log in {log}")
    with serve(options, str(parse(line)), log) as server:
        progress.advance(task)
        row = Row(policy=line, is_dense=parse(line).is_dense, start_seconds=server.start_seconds)
        console.print(f"    server ready in {row.start_seconds:.0f} s")

        def sampled(held: int) -> None:
            turn = min(len(row.turns) + 1, TURNS)
            show(f"turn {turn} of {TURNS}, {CLIENTS} clients, {held} blocks held")

        def turned() -> None:
            progress.advance(task)
            (report.say_documents if row.batch else report.say_turn)(console, row)

        asyncio.run(hold(server.url, talk, documents(), row, sampled, turned))
        show("stopping the server")
    return row


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Progress]:
    progress = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    progress.add_task("", total=steps)
    with progress:
        yield progress


def machine(engine: str) -> dict[str, str]:
    """Versions and hardware, for the report."""
    versions = {name: importlib.metadata.version(name) for name in ("kvplug", engine, "torch")}
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
