"""Whether kvplug works in the scheduler that was just built, found out by doing."""

from __future__ import annotations

from typing import Any

from kvplug_sglang import hooks
from kvplug_sglang.settings import Engine


def examine(scheduler: Any) -> None:
    """Raises RuntimeError that says which hook failed and what to do."""
    hooks.verify()
    Engine.serving().scheduler = scheduler
