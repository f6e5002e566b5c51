"""What an adapter hands the core when it packs a prompt or selects: for tests in either engine.

Settings that only an adapter hands on are lost without a word if it does not. What is right is
spelled out here from the user's settings and the model's shape, not from what the adapter holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

PROTECTED = (40, 72)
SETTINGS = {
    "policy": "snapkv(budget=128, window=16) + quest(budget=48, dense_layers=0)",
    "min_context": 300,
    "protect": [list(PROTECTED)],
}
LENGTHS = (300, 301, 333)
"""Of prompts: the first is served dense."""
LAYERS, HEADS, HEAD_DIM = 2, 2, 64
"""Of ``random_llama()``."""
STALE = 1e4
"""What another request left in a page: above every key."""


@dataclass
class Packed:
    """A prompt of one layer."""

    first_head: int
    length: int
    scale: float
    kept: Tensor  # [H, K] positions
    keys: Tensor
    """What was kept. [H, K, D]"""
    digest: Tensor
    """Of the pages it went to. [pages, H, 2, D]"""
    page_size: int


@dataclass
class Handed:
    packed: list[Packed] = field(default_factory=list)
    scales: set[float] = field(default_factory=set)
    """Of selections."""
    _last: tuple[Any, Tensor, Tensor] | None = None

    def listen(
        self, monkeypatch: pytest.MonkeyPatch, attention: ModuleType,
        packing: ModuleType | None = None,
    ) -> None:  # fmt: skip
        """attention: the adapter's, which calls ``choose_units``, and ``keep_tokens`` unless
        ``packing`` does."""
        packing = packing or attention
        keep, choose = packing.keep_tokens, attention.choose_units

        def keep_tokens(policy, prompt, kept, *more):
            tokens = keep(policy, prompt, kept, *more)
            self._last = prompt, kept, tokens
            return tokens

        def choose_units(*arguments, **named):
            self.scales.add(named["scale"])
            return choose(*arguments, **named)

        monkeypatch.setattr(packing, "keep_tokens", keep_tokens)
        monkeypatch.setattr(attention, "choose_units", choose_units)

    def note(self, digests: Tensor, slots: Tensor) -> None:
        """Behind a packing. digests [N, H, 2, D] of a layer's pages, slots [n] that were packed"""
        assert self._last is not None
        prompt, keep, tokens = self._last
        begin = 0
        for job, count in enumerate(keep.tolist()):
            pages = slots[begin : begin + count : prompt.page_size] // prompt.page_size
            kept = tokens[job, :, :count]
            index = kept[..., None].expand(-1, -1, HEAD_DIM)
            self.packed.append(
                Packed(
                    first_head=prompt.first_head,
                    length=int(prompt.lengths[job]),
                    scale=prompt.scale,
                    kept=kept,
                    keys=prompt.keys[job].transpose(0, 1).gather(1, index),
                    digest=digests[pages].clone(),
                    page_size=prompt.page_size,
                )
            )
            begin += count


def check_min_context(handed: Handed) -> None:
    """A prompt of exactly ``min_context`` tokens is not packed; one more is, in every layer."""
    found = sorted((each.first_head, each.length) for each in handed.packed)
    assert found == [(layer * HEADS, n) for layer in range(LAYERS) for n in LENGTHS[1:]]


def check_protect(handed: Handed) -> None:
    for each in handed.packed:
        for kept in each.kept.tolist():
            assert set(range(*PROTECTED)) < set(kept)


def check_scale(handed: Handed) -> None:
    assert {each.scale for each in handed.packed} == {HEAD_DIM**-0.5}
    assert handed.scales == {HEAD_DIM**-0.5}


def check_digests(handed: Handed) -> None:
    """A packed page says what it holds, not what another request left there."""
    for each in handed.packed:
        paged = each.keys.unflatten(1, (-1, each.page_size)).transpose(0, 1)  # [pages, H, S, D]
        extremes = torch.stack([paged.amin(2), paged.amax(2)], 2)
        torch.testing.assert_close(each.digest, extremes, rtol=0, atol=0)
