"""A file of heads, and who reads by it in an engine, for tests in either."""

from __future__ import annotations

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


def line(folder: Path, best: dict[int, Sequence[str]] = BEST, shape: Shape = LLAMA) -> str:
    """A policy by a file in that folder, whose patterns read different pages."""
    made(best, shape).save(file := folder / "heads.json")
    return f"minference(vertical=30, slash=100, sinks=32, budget=192, heads={str(file)!r})"


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
