"""PyramidKV: much for the first layers, little for the last, the mean as asked.

    budget of layer l  =  W + max - l (max - min) / (L - 1)
    min = (K - W) / beta,   max = 2 (K - W) - min

for L layers, a mean of K tokens and W that always stay (sinks and window).

Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
2024, https://arxiv.org/abs/2406.02069

Differs from the paper: the layers form three classes of equal size (they differ by one where L is
no multiple of three), each with the mean of its layers' budgets, so that an engine can free pages
of a class. Shares are fixed before any prompt: where a class's is more than a prompt has, the
paper's code raises the others', here nobody gets the rest. Of 601 tokens at budget=451 the classes
of 30 layers could keep 705, 451 and 197 and keep 601, 451 and 197, a mean of 416; only prompts of
twice the budget keep all of it. Any score may be wrapped. kvpress takes min = K / beta and serves
SnapKV where that is below W; here the formula holds for every K of at least W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvplug.compress import LayerBudgets
from kvplug.policy import Evidence

CLASSES = 3


@dataclass(frozen=True, kw_only=True)
class Pyramid(LayerBudgets):
    name = "pyramid"
    evidence = Evidence.WINDOW_QUERIES
    query_agnostic = False
    paper = "https://arxiv.org/abs/2406.02069"

    beta: float = 20
    """How steep: the last layer keeps 1 / beta of the mean, beside what always stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.beta, bool)
            or not isinstance(self.beta, (int, float))
            or not self.beta >= 1
        ):
            raise ValueError(
                f"pyramid: beta must be a number of at least 1, got {self.beta!r}; "
                "write pyramid(snapkv(budget=1024), beta=20)"
            )

    def layer_budgets(self, layers: int) -> tuple[int, ...]:
        always = self.base.sinks + self.base.window
        least = (self.base.budget - always) / self.beta
        most = 2 * (self.base.budget - always) - least
        step = (most - least) / max(layers - 1, 1)
        budgets = self.base.budget + step * ((layers - 1) / 2 - np.arange(layers))
        classes = np.array_split(budgets, min(CLASSES, layers))
        return tuple(round(float(one.mean())) for one in classes for _ in one)
