"""The engine's own ways to a smaller cache, as rows of a sweep: no policy, no kvplug.

``engine(kv_cache_dtype=fp8_e5m2)`` and ``engine(sliding_window=512)`` start vLLM with its own
attention and that option.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""What vLLM's CPU backend names as supported; it also starts with others, and answers nonsense."""
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Stock:
    kv_cache_dtype: str = AUTO
    sliding_window: int = 0
    """Tokens that every layer sees; 0 for all."""

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in (AUTO, *FP8):
            raise ValueError(
                f"engine(kv_cache_dtype=...) must be {', '.join(FP8)}, got {self.kv_cache_dtype!r}"
            )
        if self.kv_cache_dtype == AUTO and not self.sliding_window:
            raise ValueError(
                "write engine(kv_cache_dtype=fp8_e5m2) or engine(sliding_window=512); "
                "without either it is dense"
            )

    def __str__(self) -> str:
        given = []
        if self.kv_cache_dtype != AUTO:
            given.append(f"kv_cache_dtype={self.kv_cache_dtype}")
        if self.sliding_window:
            given.append(f"sliding_window={self.sliding_window}")
        return f"engine({', '.join(given)})"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of vLLM's EngineArgs. A model that says nothing of a window has it in every layer."""
        found: dict[str, Any] = {"kv_cache_dtype": self.kv_cache_dtype}
        if self.sliding_window:
            found["hf_overrides"] = {"sliding_window": self.sliding_window}
        return found

    def reads(self, tokens: int) -> int:
        """Of so many cached tokens, by arithmetic: a stock engine counts no reads."""
        return min(tokens, self.sliding_window or tokens)


def is_stock(policy: str) -> bool:
    return policy.startswith("engine(")


def parse_stock(line: str) -> Stock:
    """Raises ValueError."""
    inside = re.fullmatch(r"engine\((.*)\)", line)
    given: dict[str, Any] = {}
    for option in (inside[1] if inside else line).split(","):
        found = re.fullmatch(
            r"\s*(?:(kv_cache_dtype)=(\w+)|(sliding_window)=([1-9]\d*))\s*", option
        )
        if inside is None or found is None:
            raise ValueError(
                "write engine(kv_cache_dtype=fp8_e5m2) or engine(sliding_window=512), "
                f"got {line!r}"
            )
        if found[1]:
            given["kv_cache_dtype"] = found[2]
        else:
            given["sliding_window"] = int(found[4])
    return Stock(**given)
