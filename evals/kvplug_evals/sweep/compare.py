"""Two directories of results side by side: the same settings, other versions, seeds or engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvplug_evals.sweep.results import Result, results
from kvplug_evals.sweep.stats import Difference, paired, summary


@dataclass(frozen=True, kw_only=True)
class Row:
    """A setting that both have, on a task."""

    setting: str
    policy: str
    task: str
    before: float
    """Accuracy."""
    after: float
    difference: Difference | None
    """Of it; None where no question is in common."""
    loss: Difference | None


def as_table(before: Path, after: Path, rows: list[Row]) -> Table:
    table = Table(
        title=f"{after} against {before}",
        caption="difference on the same questions, with a 95 % bootstrap interval over contexts",
        box=box.SIMPLE,
    )
    for column in ("setting", "policy", "task", "before", "after", "difference", "loss"):
        table.add_column(column, overflow="fold")
    for row in rows:
        difference = row.difference
        table.add_row(
            row.setting,
            row.policy,
            row.task,
            f"{row.before:.3f}",
            f"{row.after:.3f}",
            "no question in common"
            if difference is None
            else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
            + (" *" if difference.is_clear else ""),
            "" if row.loss is None else f"{row.loss.mean:+.3f}",
        )
    return table


def as_data(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def compare(before: Path, after: Path) -> list[Row]:
    """Settings that both have, by policy and place. Raises ValueError if there is none."""
    pairs = list(_pairs(before, after))
    if not pairs:
        raise ValueError(f"{before} and {after} have no setting in common")
    return [row for old, new in pairs for row in _rows(old, new)]


def _rows(old: Result, new: Result) -> Iterator[Row]:
    _, tokens, mode, question = new.place
    for task in dict.fromkeys(row["task"] for row in new.rows):
        rows, base = new.of_task(task), old.of_task(task)
        if base:
            yield Row(
                setting=f"{tokens:,}, {mode}, {question}", policy=new.policy,
                task=f"{task} ({new.source(task)})", before=summary(base)[task]["fixed"],
                after=summary(rows)[task]["fixed"], difference=paired(rows, base, "fixed"),
                loss=paired(rows, base, "loss"),
            )  # fmt: skip


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
