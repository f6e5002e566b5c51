"""Differences between two settings on the same questions, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


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
