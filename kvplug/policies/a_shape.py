"""A-shape: a prompt's queries read its first tokens and the most recent ones.

    query t reads token j  iff  j < sinks  or  t - window < j <= t

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention", NeurIPS 2024, https://arxiv.org/abs/2407.02490 (the pattern, with its defaults, of
StreamingLLM)

Differs from the paper: a block of queries reads what its first may, rounded out to whole pages, so
that one table serves every head and layer; and what is decoded reads everything, as the cache
keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.generate import PositionalPrefill
from kvplug.policy import Positions


@dataclass(frozen=True, kw_only=True)
class AShape(PositionalPrefill):
    name = "a_shape"
    reads = "all; a prompt's queries sinks + window"
    paper = "https://arxiv.org/abs/2407.02490"

    window: int = 3968
    """Most recent tokens that a prompt's query reads, itself included."""
    last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.window
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(
                f"{self.name}: window must be a number of tokens, at least 1, got {window!r}; "
                f"write {self.name}(sinks=128, window=3968)"
            )

    def first_token(self, positions: Positions) -> Positions:
        return (positions - self.window + 1).clip(min=0)
