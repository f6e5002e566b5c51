"""What was measured of lines in answers: the numbers behind ``published.json``.

That file is made by ``tools/published.py`` from the reports of ``evals/results`` and the tables of
the documentation. A line is as good as the published one of the same policy and options that reads
or keeps, as a share of the context, at most as much; what was measured at a few thousand tokens of
a small model is all there is, and stands for longer contexts and larger models by hope alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

from kvplug.composition import Composition
from kvplug.grammar import parse
from kvplug.policy import Policy

SPENT = ("budget", "dense_layers", "seed")
"""Options that say how much, and none that make another method of it."""
ENGINE_FP8 = "engine(kv_cache_dtype=fp8_e4m3)"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line's loss on one task."""

    policy: str
    tokens: int
    """Of the prompts, in the mean."""
    task: str
    model: str
    source: str
    """File of the project that says so."""
    loss: float | None = None
    """Nats a token over dense; None where it is look-ups that were counted."""
    found: float | None = None
    """Share of exact recall's look-ups that come out right; dense finds all."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of a line, at the share of the context that it reads or keeps."""

    loss: Row | None
    """The task that loses most."""
    found: Row | None
    sources: tuple[str, ...]

    @property
    def measured(self) -> bool:
        return self.loss is not None or self.found is not None


CLASSES: Mapping[str, tuple[float, float]] = {
    "close": (0.1, 0.99),
    "near": (0.25, 0.9),
    "any": (float("inf"), 0.0),
}
"""A class -> nats that a line may lose on the published text that it does worst on, and the share
of exact recall's look-ups that it has to find. What was not measured is in none but ``any``."""


def in_class(quality: Quality, name: str) -> bool:
    most, least = CLASSES[name]
    if name == "any":
        return True
    loses = quality.loss is not None and quality.loss.loss is not None
    lost = loses and quality.loss.loss <= most  # type: ignore[union-attr, operator]
    found = quality.found is None or (quality.found.found or 0.0) >= least
    return bool(lost and found)


@cache
def published() -> tuple[Row, ...]:
    text = files("kvplug.advice").joinpath("published.json").read_text()
    return tuple(Row(**row) for row in json.loads(text))


def quality_of(line: str, tokens: int) -> Quality:
    """line: a policy line, or ``ENGINE_FP8``. tokens: of the context that it is to serve."""
    nearest: dict[tuple[str, str], tuple[tuple[float, ...], Row]] = {}
    for row in published():
        share = _comparable(row, line, tokens)
        if share is None:
            continue
        place = (row.task, row.model)
        if place not in nearest or nearest[place][0] < share:
            nearest[place] = (share, row)
    rows = [row for _, row in nearest.values()]
    losing = [row for row in rows if row.loss is not None]
    finding = [row for row in rows if row.found is not None]
    return Quality(
        loss=max(losing, key=lambda row: row.loss or 0.0, default=None),
        found=min(finding, key=lambda row: row.found or 0.0, default=None),
        sources=tuple(sorted({row.source for row in rows})),
    )


def _comparable(row: Row, line: str, tokens: int) -> tuple[float, ...] | None:
    """The published line's shares, where it is the same method at no larger ones."""
    if line == ENGINE_FP8 or row.policy.startswith("engine("):
        return () if row.policy == line else None
    theirs, ours = _method(row.policy), _method(line)
    if theirs != ours:
        return None
    shares = _shares(parse(row.policy), row.tokens)
    own = _shares(parse(line), tokens)
    # A page or two more or less is none of the method's.
    enough = all(a <= 1.05 * b for a, b in zip(shares, own, strict=True))
    return shares if enough and _dense_layers(row.policy) <= _dense_layers(line) else None


def _dense_layers(line: str) -> int:
    return max((getattr(policy, "dense_layers", 0) for policy in parse(line)), default=0)


@cache
def _method(line: str) -> tuple[object, ...]:
    return tuple(_options(policy) for policy in parse(line))


def _options(policy: Policy) -> tuple[object, ...]:
    budgeted = "budget" in {field.name for field in fields(policy)}
    spent = SPENT if budgeted else (*SPENT, "window")
    values = [
        (field.name, _options(value) if isinstance(value, Policy) else value)
        for field in fields(policy)
        if field.name not in spent
        for value in [getattr(policy, field.name)]
    ]
    return policy.name, tuple(values)


def _shares(composition: Composition, tokens: int) -> tuple[float, ...]:
    """Of the context, that each policy of a line reads or keeps."""
    found = []
    for policy in composition:
        part = policy.parts[-1]
        spent = getattr(part, "budget", None)
        if spent is None:
            spent = getattr(part, "sinks", 0) + getattr(part, "window", tokens)
        found.append(spent if isinstance(spent, float) else min(1.0, spent / tokens))
    return tuple(found)
