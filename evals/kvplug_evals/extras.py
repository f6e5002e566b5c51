"""What a command needs beyond the package itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(command: str, extras: str) -> Iterator[None]:
    """While its modules are imported: says which one is missing, and what brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{command} needs {error.name}; install it with: pip install 'kvplug[{extras}]'"
        ) from None
