"""What commands show: tables, the same as JSON, and how far long work is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

STDOUT = Path("-")
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="All figures as JSON; - is standard output, for them alone."
    ),
]


def write_json(data: object, to: Path | None) -> None:
    """Where --json says; nowhere if it says nothing."""
    if to is None:
        return
    text = json.dumps(data, indent=1, default=str) + "\n"
    if to == STDOUT:
        sys.stdout.write(text)
    else:
        to.write_text(text)


@contextmanager
def screen(to: Path | None) -> Iterator[Console]:
    """For tables. While JSON has standard output, they and all else go to standard error."""
    if to is not None:
        to.parent.resolve(strict=True)  # now, and not when all is measured
    with printing_to_stderr() if to == STDOUT else nullcontext():
        yield Console(stderr=to == STDOUT, highlight=False)


@contextmanager
def printing_to_stderr() -> Iterator[None]:
    """What engines print, and processes that they start, is no part of a command's output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class Bar:
    """Of one piece of work."""

    def __init__(self, progress: Progress, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def say(self, what: str) -> None:
        """what: rich's markup."""
        self._progress.update(self._task, description=what)

    def advance(self, steps: float = 1) -> None:
        self._progress.advance(self._task, steps)

    def reach(self, done: float, total: float) -> None:
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def progress(console: Console, total: float | None = None) -> Iterator[Bar]:
    """total: steps, where they are known at the start. Nothing is shown where no terminal is."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown:
        yield Bar(shown, total)
