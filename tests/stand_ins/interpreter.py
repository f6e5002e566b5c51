"""Triton's interpreter without what it does again and again.

It puts its own functions into ``triton.language`` for a launch, and once more for each call of a
function within a kernel: a third of its time. There they are in place already.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def patch_once() -> None:
    """Where TRITON_INTERPRET=1 was set before Triton's import."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, languages = interpreter._patch_lang, (tl, tl.core)
    patched: set[str] = set()
    """Of the languages, by the launch that runs."""

    @functools.cache
    def seen_by(function: Any) -> frozenset[str]:
        values = function.__globals__.values()
        return frozenset(each.__name__ for each in languages if any(v is each for v in values))

    def once(function: Any) -> Any:
        seen = seen_by(function)
        if seen and seen <= patched:
            return None  # a call within a launch, which asks for nothing
        scope = patch(function)
        patched.update(seen)
        restore = scope.restore

        def done() -> None:
            restore()
            patched.clear()

        scope.restore = done
        return scope

    interpreter._patch_lang = once
