"""What a model's attention heads look at, as ``kvplug calibrate`` measured and saved it.

A file is of one model: of a type, with so many layers and heads. Others are refused with what they
are, before anything is served by it. Layers are numbered as the model numbers them; those that
have a window of their own were not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

VERTICAL_SLASH, A_SHAPE, BLOCK_SPARSE = PATTERNS = ("vertical_slash", "a_shape", "block_sparse")
"""What a head of a prompt may read (``kvplug.policies.minference``)."""
OUTSIDE, LOST = "outside", "lost"
VERSION = 1
FORMAT = "kvplug heads"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """By which a model is told from others."""

    type: str
    """As transformers names it."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """config: a model's of transformers, that of its text. Raises ValueError for one without
        attention heads."""
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):
            raise ValueError(
                f"a model of type {config.model_type!r} does not say how many attention heads it "
                "has; name one whose configuration has num_attention_heads"
            )
        return cls(
            type=config.model_type,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
        )

    def __str__(self) -> str:
        return (
            f"{self.type}, {self.layers} layers, {self.heads} heads of {self.head_dim}, "
            f"{self.kv_heads} KV heads, {self.vocabulary:,} tokens in its vocabulary"
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Of one layer's heads."""

    recall: Mapping[str, Sequence[float]]
    """Of each pattern: the share of its attention that each query head finds again. [Hq]"""
    outside: Sequence[float]
    """Of each KV head: the share of its group's attention that goes neither to the first tokens
    nor to the window behind each query; a head that looks everywhere alike has much, too. [H]"""
    lost: Sequence[float]
    """Of each KV head: the share of its group's output, squared, that changes where queries see
    only those. A head that retrieves loses much, one that streams or says nothing loses none. [H]
    """


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A file's content."""

    model: str
    """Its name, for people."""
    shape: Shape
    settings: Mapping[str, Any]
    """What it was measured with and on."""
    layers: Mapping[int, Layer]

    def save(self, file: Path) -> None:
        """As JSON, one layer a line."""
        head = {
            "format": FORMAT, "version": VERSION, "model": self.model,
            "shape": asdict(self.shape), "settings": dict(self.settings),
        }  # fmt: skip
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        each = {
            n: _rounded({**one.recall, OUTSIDE: one.outside, LOST: one.lost})
            for n, one in sorted(self.layers.items())
        }
        layers = [f'"{n}": {json.dumps(shares)}' for n, shares in each.items()]
        body = ",\n  ".join(layers)
        file.write_text("{\n" + ",\n".join(lines) + f',\n"layers": {{\n  {body}\n}}\n}}\n')

    def check(self, shape: Shape, what: str) -> None:
        """Raises ValueError where it is of another model than one of this shape."""
        if shape != self.shape:
            raise ValueError(
                f"{what} was made for {self.model} ({self.shape}), and the model served is "
                f"another ({shape}); make its own: kvplug calibrate MODEL --out FILE"
            )

    def patterns(self, first_head: int, heads: int, group: int) -> tuple[str, ...]:
        """What finds most of the attention of each of a rank's KV heads, as its own query heads
        have it on average; the first of equals, and of a layer that was not measured.

        first_head: number of the first of them, counted through the model, a KV head that several
        ranks hold once for each. group: query heads of each.
        """
        layer, first = divmod(first_head * group, self.shape.heads)
        measured = self.layers.get(layer)
        if measured is None:
            return (PATTERNS[0],) * heads

        def found(pattern: str, head: int) -> float:
            return sum(measured.recall[pattern][first + head * group :][:group])

        return tuple(max(PATTERNS, key=lambda p: found(p, head)) for head in range(heads))


@lru_cache(maxsize=16)
def read_heads(file: str) -> Heads:
    """What ``kvplug calibrate`` saved; read once by a process. Raises ValueError that says what to
    write instead of a file that is missing, damaged or something else."""
    again = "make one: kvplug calibrate MODEL --out FILE"
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"cannot read the file of heads {file!r}: {reason}; {again}") from None
    try:
        given = json.loads(text)
        if given["format"] != FORMAT or given["version"] != VERSION:
            raise ValueError(f"it is {given['format']!r}, version {given['version']!r}")
        return _parsed(given)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        lacks = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{file!r} is no whole file of heads, version {VERSION}: {lacks}; {again}"
        ) from None


def _parsed(given: Mapping[str, Any]) -> Heads:
    counts = {each.name: given["shape"][each.name] for each in fields(Shape)}
    for name, value in counts.items():
        if name != "type" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"its shape has {name} = {value!r}")
    shape = Shape(**counts)
    layers = {int(n): _layer(n, each, shape) for n, each in given["layers"].items()}
    if not layers or not all(0 <= n < shape.layers for n in layers):
        raise ValueError(f"its layers are {list(layers)}, of {shape.layers}")
    return Heads(
        model=str(given["model"]), shape=shape, settings=dict(given["settings"]), layers=layers
    )


def _layer(number: str, given: Mapping[str, Any], shape: Shape) -> Layer:
    def shares(name: str, heads: int) -> tuple[float, ...]:
        values = given[name]
        if len(values) != heads or not all(_is_share(value) for value in values):
            raise ValueError(f"layer {number} has no {heads} shares as {name!r}")
        return tuple(map(float, values))

    recall = {pattern: shares(pattern, shape.heads) for pattern in PATTERNS}
    outside, lost = (shares(name, shape.kv_heads) for name in (OUTSIDE, LOST))
    return Layer(recall=recall, outside=outside, lost=lost)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _rounded(given: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [round(float(each), 4) for each in values] for name, values in given.items()}
