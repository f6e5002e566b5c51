"""What would be wrong, refused at start with the reason and the nearest thing that works."""

from __future__ import annotations

from typing import Any

from kvplug import read_settings


def refuse(server_args: Any, given: object) -> dict[str, Any]:
    read_settings(given, environ={})
    return {}
