"""Names that may be imported, not used."""

from typing import Any


def absent(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
