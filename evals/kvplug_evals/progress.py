"""How far long work is, and what is left of it, where somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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
