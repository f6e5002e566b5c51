"""Two directories of results side by side: the same settings, other versions, seeds or engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvplug_evals.sweep.results import Result, results
from kvplug_evals.sweep.stats import paired, summary


def compare(before: Path, after: Path) -> Table:
    """Settings that both have, by policy and place. Raises ValueError if there is none."""
    table = Table(
        title=f"{after} against {before}",
        caption="difference on the same questions, with a 95 % bootstrap interval over contexts",
        box=box.SIMPLE,
    )
    for column in ("setting", "policy", "task", "before", "after", "difference", "loss"):
        table.add_column(column, overflow="fold")
    pairs = list(_pairs(before, after))
    if not pairs:
        raise ValueError(f"{before} and {after} have no setting in common")
    for old, new in pairs:
        _, tokens, mode, question = new.place
        for task in dict.fromkeys(row["task"] for row in new.rows):
            rows, base = new.of_task(task), old.of_task(task)
            if not base:
                continue
            difference, loss = paired(rows, base, "fixed"), paired(rows, base, "loss")
            table.add_row(
                f"{tokens:,}, {mode}, {question}",
                new.policy,
                f"{task} ({new.source(task)})",
                f"{summary(base)[task]['fixed']:.3f}",
                f"{summary(rows)[task]['fixed']:.3f}",
                "no question in common"
                if difference is None
                else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
                + (" *" if difference.is_clear else ""),
                "" if loss is None else f"{loss.mean:+.3f}",
            )
    return table


def _pairs(before: Path, after: Path) -> Iterator[tuple[Result, Result]]:
    old: dict[tuple[Any, ...], list[Result]] = {}
    for result in results(before):
        old.setdefault((result.place, result.policy), []).append(result)
    for new in results(after):
        same = old.get((new.place, new.policy), [])
        if same:
            yield max(same, key=lambda result: _shared(result, new)), new


def _shared(one: Result, other: Result) -> int:
    """How much of their settings is the same: of several seeds or engines the nearest."""
    rest = other.flat.items()
    return sum(item in rest for item in one.flat.items())
