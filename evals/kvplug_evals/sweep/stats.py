"""Means of a setting's answers, and differences between two on the same questions, with bootstrap
intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95
MEASURES = (
    "fixed",
    "compat",
    "loss",
    "agreement",
    "held_bytes",
    "peak_bytes",
    "freed_blocks",
    "cached_per_step",
    "read_per_step",
    "prompt_tokens",
    "cached_tokens",
    "first_token_seconds",
    "token_seconds",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    mean: float
    low: float
    high: float
    questions: int

    @property
    def is_clear(self) -> bool:
        """The interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired(
    rows: Sequence[dict[str, Any]],
    baseline: Sequence[dict[str, Any]],
    measure: str,
    seed: int = 0,
) -> Difference | None:
    """Mean of rows - baseline over the questions that both have, with a 95 % interval.

    Whole contexts are drawn, since the turns over one context are no independent questions; of
    one context alone nothing is known but its own mean. None where nothing is shared.
    """
    before = {_question(row): row for row in baseline}
    by_context: dict[str, list[float]] = {}
    for row in rows:
        other = before.get(_question(row))
        if other is None or row.get(measure) is None or other.get(measure) is None:
            continue
        by_context.setdefault(row["conversation"], []).append(row[measure] - other[measure])
    if not by_context:
        return None
    sums = np.array([sum(values) for values in by_context.values()])
    counts = np.array([len(values) for values in by_context.values()])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if len(sums) == 1:
        low, high = -np.inf, np.inf
    return Difference(
        mean=float(sums.sum() / counts.sum()),
        low=float(low),
        high=float(high),
        questions=int(counts.sum()),
    )


def _question(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["conversation"], row["turn"]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means, of each task and each of its turns."""

    def means(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {"questions": len(some)}
        for measure in MEASURES:
            values = [row[measure] for row in some if row.get(measure) is not None]
            if values:
                found[measure] = sum(values) / len(values)
        return found

    whole = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        turns = sorted({row["turn"] for row in of_task})
        whole[task] = {
            **means(of_task),
            "turns": [means([row for row in of_task if row["turn"] == t]) for t in turns],
        }
    return whole
