"""A file of heads, and who reads by it in an engine, for tests in either."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvplug.heads import PATTERNS, Heads, Layer, Shape

A, B, C = PATTERNS
LLAMA = Shape(type="llama", layers=2, heads=4, kv_heads=2, head_dim=64, vocabulary=512)
"""``random_llama()``."""
TWO_KINDS = {
    0: [0.1, 0.9, 0.1, 0.1],  # two layers alike, one of another kind, one of one kind alone
    1: [0.9, 0.2, 0.8, 0.1],
    2: [0.2, 0.9, 0.2, 0.2],
    3: [0.3, 0.3, 0.3, 0.3],
}
"""What KV heads lose, of which four of 16 retrieve."""
BEST = {0: [B, B, C, C], 1: [A, A, B, B]}


def made(best: dict[int, Sequence[str]], shape: Shape = LLAMA) -> Heads:
    """In which the given pattern is each query head's best. {layer: [Hq]}"""
    layers = {
        n: Layer(
            recall={p: [0.9 if p == each else 0.25 for each in row] for p in PATTERNS},
            outside=[0.5] * shape.kv_heads,
            lost=[0.5] * shape.kv_heads,
        )
        for n, row in best.items()
    }
    return Heads(model="tiny", shape=shape, settings={"density": 0.5}, layers=layers)


def losing(lost: dict[int, Sequence[float]], shape: Shape = LLAMA) -> Heads:
    """In which each KV head loses so much without what is far. {layer: [H]}"""
    layers = {
        n: Layer(
            recall={p: [0.5] * shape.heads for p in PATTERNS}, outside=[0.5] * len(each), lost=each
        )
        for n, each in lost.items()
    }
    return Heads(model="tiny", shape=shape, settings={}, layers=layers)


def line(folder: Path, best: dict[int, Sequence[str]] = BEST, shape: Shape = LLAMA) -> str:
    """A policy by a file in that folder, whose patterns read different pages."""
    made(best, shape).save(file := folder / "heads.json")
    return f"minference(vertical=30, slash=100, sinks=32, budget=192, heads={str(file)!r})"


def duo(folder: Path, model: Path) -> Callable[[str], str]:
    """A line of a base for a random Llama of as many layers and KV heads as ``TWO_KINDS``."""
    config = json.loads((model / "config.json").read_text())
    shape = Shape(
        type="llama", layers=4, heads=config["num_attention_heads"], kv_heads=4,
        head_dim=config["head_dim"], vocabulary=config["vocab_size"],
    )  # fmt: skip
    losing(TWO_KINDS, shape).save(file := folder / "heads.json")
    return lambda base: f"duo({base}, heads={str(file)!r}, retrieval=0.25, sink=8, recent=40)"


class Watched:
    """Whether each KV head of each layer reads what it would by its own pattern alone."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, attention: ModuleType, cls: type, method: str,
        layer_of: Callable[[Any], int],
    ) -> None:  # fmt: skip
        """method: of the adapter's class, which calls ``attention.choose_pages`` for a layer."""
        self.heads: set[tuple[int, int, str]] = set()
        """Layer, KV head and pattern of those that another would have served otherwise."""
        plain, choose = getattr(cls, method), attention.choose_pages
        layers: list[int] = []

        def watched(own: Any, layer: Any, *more: Any) -> Any:
            layers.append(layer_of(layer))
            return plain(own, layer, *more)

        def choosing(selector: Any, *more: Any, **named: Any) -> Any:
            chosen, counts = choose(selector, *more, **named)
            by = {
                p: choose(replace(selector, heads=None, pattern=p), *more, **named)
                for p in PATTERNS
            }
            for head, pattern in enumerate(BEST[layers[-1]][:: LLAMA.heads // LLAMA.kv_heads]):
                alike = {p for p in PATTERNS if torch.equal(chosen[:, head], by[p][0][:, head])}
                assert pattern in alike
                if len(alike) == 1:
                    self.heads.add((layers[-1], head, pattern))
            return chosen, counts

        monkeypatch.setattr(cls, method, watched)
        monkeypatch.setattr(attention, "choose_pages", choosing)
