"""What a doctor finds. Each adapter's makes checks of its own, ``kvplug doctor`` shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str

    @classmethod
    def of(cls, name: str, find: Callable[[], str]) -> Check:
        """Passed with the detail that ``find`` returns; failed with the error that it raises."""
        try:
            return cls(name, True, find())
        except Exception as error:  # a diagnosis reports whatever it meets
            return cls(name, False, f"{type(error).__name__}: {error}")
