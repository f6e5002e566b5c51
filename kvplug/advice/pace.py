"""What decode steps take on a machine where some were measured (``kvplug bench decode``).

Of n requests, with the bytes of a step's reads parted by how they are read,

    step     = fixed + n * (each + whole * w) + choosing
    choosing = layers that choose * layer + n * (chosen * r + scanned * s)

*fixed* is the weights, the host and the kernels of a step, *each* a request's share of them;
*whole* what layers read without choosing. What chooses, by pages or by tokens, has a rate of its
own for what it reads (tokens lie scattered) and for the digests or codes that it scores, the
arithmetic of that and finding the best counted in; *layer* is what every choosing layer costs
whatever its length: launches, tables. The six are fitted to short runs, lengths and budgets apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvplug.advice.model import Model
from kvplug.composition import Composition


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What a request's decode step reads of the cache, over all layers."""

    whole: float = 0.0
    """In layers that do not choose."""
    chosen: float = 0.0
    """In layers that do."""
    scanned: float = 0.0
    """Of digests or codes, to choose by."""
    choosing: int = 0
    """Layers that do."""

    @property
    def bytes(self) -> float:
        return self.whole + self.chosen + self.scanned

    def __add__(self, other: StepBytes) -> StepBytes:
        both = {
            one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)
        }
        return StepBytes(**both)


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """Of one method."""

    layer: float
    """Seconds of a layer and step."""
    chosen: float
    """Seconds of a byte that it reads."""
    scanned: float
    """Seconds of a byte that it chooses by."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Of one model on one machine. Seconds, or seconds a byte."""

    source: str
    """The file."""
    model: Mapping[str, Any]
    """``shape_of`` the model."""
    itemsize: int
    """Bytes of a number in the cache."""
    block_size: int
    fixed: float
    each: float
    whole: float
    arithmetic: float
    """Multiplications and additions a second, of a prompt."""
    methods: Mapping[str, Choosing]
    """By ``reader``."""

    def step(self, reader: str | None, n: int, read: StepBytes) -> float:
        """Seconds of a decode step of n requests that read so much each. Raises ValueError."""
        seconds = self.fixed + n * (self.each + read.whole * self.whole)
        if reader is None:
            return seconds
        if reader not in self.methods:
            raise ValueError(
                f"steps of {reader} are not in {self.source}; write kvplug bench decode --policy "
                "with such a line"
            )
        method = self.methods[reader]
        own = read.chosen * method.chosen + read.scanned * method.scanned
        return seconds + read.choosing * method.layer + n * own

    def check(self, model: Model, block_size: int) -> None:
        """Raises ValueError where it is another model's or another size of blocks."""
        if shape_of(model) != self.model:
            raise ValueError(
                f"{self.source} was measured with another model: {said(self.model)}; this one has "
                f"{said(shape_of(model))}. Write kvplug bench decode --model {model.name}"
            )
        if block_size != self.block_size:
            raise ValueError(
                f"{self.source} was measured with blocks of {self.block_size} tokens, got "
                f"{block_size}; write --block-size {self.block_size}"
            )


def reader(policy: Composition) -> str | None:
    """What reads its pages otherwise than dense attention does: a format, a selector; None for
    neither."""
    parts = [part.name for part in (policy.format, policy.selector) if part is not None]
    return " + ".join(parts) or None


def shape_of(model: Model) -> dict[str, Any]:
    """What a pace depends on, as JSON has it."""
    each = model.attention
    return {
        "layers": len(model.layers),
        "heads": model.heads,
        "kv": [list(x) for x in sorted({(x.kv_heads, x.head_dim, x.window or 0) for x in each})],
        "parameters": round(model.shared / model.weight_size),
        "ranks": model.ranks,
    }


def said(shape: Mapping[str, Any]) -> str:
    return f"{shape['layers']} layers, {shape['parameters'] / 1e6:,.0f}M weights a step"


def read_pace(file: Path) -> Pace:
    """Of a ``kvplug bench decode``'s JSON. Raises ValueError."""
    try:
        found = json.loads(file.read_text())["pace"]
        methods = {name: Choosing(**each) for name, each in found.pop("methods").items()}
        return Pace(source=str(file), methods=methods, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--pace is a file that kvplug bench decode wrote, and {file} is none ({error!r}); "
            "write kvplug bench decode --model MODEL --out pace.json"
        ) from None
