"""Where a number was measured, and the table it stands in."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kvplug

WIDTH = 100  # of a table, also where nobody looks (a pipe is taken for 80 columns)


def provenance(command: str, engine: str) -> dict[str, Any]:
    """What stands beside the numbers; ``load_at_end`` is the caller's to add."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": (git("status", "--porcelain", "-uno") or "").splitlines(),
        "kvplug": kvplug.__version__,
        engine: version(engine),
        "torch": version("torch"),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
    }


def heading(source: dict[str, Any], engine: Any) -> str:
    """Of a table of servers: how it was made. engine: a ``served.engine.Engine``"""
    return (
        f"[bold]{escape(source['command'])}[/]\n{source['date']}, commit {source['commit']}, "
        f"{engine.title} {source[engine.package]}, torch {source['torch']}, {source['cpu']}, "
        f"{engine.threads} threads of {source['cores']} cores, load "
        f"{source['load_at_start']:.1f} to {source['load_at_end']:.1f}\n"
    )


def save_with_table(out: Path, text: str, show: Callable[[Console], None]) -> None:
    """JSON, and beside it what is shown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    with out.with_suffix(".txt").open("w") as file:
        show(Console(file=file, width=WIDTH, highlight=False))


def git(*arguments: str) -> str | None:
    """None where there is no git, or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(title: str, columns: list[str], *, left: int = 1) -> Table:
    """The first ``left`` columns are names, the others numbers."""
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return made
