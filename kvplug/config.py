"""Settings from the outside world: the only module that reads the environment.

Both engines give a mapping (vLLM: ``--additional-config '{"kvplug": {...}}'``) or nothing;
``KVPLUG_POLICY`` stands in for a policy that the mapping does not name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from kvplug.composition import Composition
from kvplug.grammar import parse
from kvplug.policy import LIMIT
from kvplug.registry import did_you_mean

DEFAULT_POLICY = "twilight(budget=0.0625)"
DEFAULT_MIN_CONTEXT = 8192
ENVIRONMENT = "KVPLUG_POLICY"
FOR_TESTS = ("shortcut",)
OF_REQUESTS = ("repeats", "compiled", "chunks")
FARTHEST = 1 << 24
"""Tokens: no position beyond is protected, as each protected page is written down."""

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an engine was asked to do."""

    policy: Composition = field(default_factory=Composition)
    min_context: int = 0
    """Requests no longer than this many tokens are served dense."""
    protect: tuple[Span, ...] = ()
    """Token spans [first, last) of every request that no policy may evict."""
    shortcut: bool = True
    """Serve what a policy would read whole through the engine's own path. Tests switch it off."""
    repeats: bool = False
    """A request's own: its prompt ends with its last chunk once more, which compiles that."""
    compiled: int = 0
    """A request's own: chunks at its start that it found compiled."""
    chunks: tuple[Span, ...] = ()
    """A request's own: spans [first, last) of its prompt, ascending, that may be taken as they
    were read alone."""

    def __str__(self) -> str:
        spans = f", protect={[list(span) for span in self.protect]}" if self.protect else ""
        return f"policy {str(self.policy)!r}, min_context={self.min_context}{spans}"


def read_settings(given: object = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The ``kvplug`` entry of an engine's configuration -> settings.

    Without a policy anywhere: twilight(budget=0.0625) above 8,192 tokens, dense below. A named
    policy has ``min_context=0`` unless it says otherwise. Raises ValueError that names the key,
    what was wanted, what came and what to write instead.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f'kvplug\'s configuration must be a mapping such as {{"policy": "{DEFAULT_POLICY}"}}, '
            f"got {given!r}"
        )
    own = (*FOR_TESTS, *OF_REQUESTS)
    check_keys(given, [f.name for f in fields(Settings) if f.name not in own])
    line = given.get("policy")
    if line is None:
        line = stand_in(environ)
    min_context = given.get("min_context", DEFAULT_MIN_CONTEXT if line is None else 0)
    shortcut = given.get("shortcut", True)
    if not isinstance(shortcut, bool):
        raise ValueError(f"kvplug: shortcut must be true or false, got {shortcut!r}")
    return Settings(
        policy=parse(DEFAULT_POLICY if line is None else line),
        min_context=token_count(min_context, "min_context"),
        protect=_spans(given.get("protect", ())),
        shortcut=shortcut,
    )


def stand_in(environ: Mapping[str, str] | None = None) -> str | None:
    """What KVPLUG_POLICY says; None where it says nothing."""
    return (os.environ if environ is None else environ).get(ENVIRONMENT) or None


def check_keys(given: Mapping[object, object], known: Sequence[str]) -> None:
    """Raises ValueError that names what a user may write."""
    for key in given:
        if key not in known and key not in FOR_TESTS:
            raise ValueError(
                f"kvplug has no setting {key!r}.{did_you_mean(str(key), list(known))}"
            )


def token_count(value: object, name: str, limit: int = LIMIT) -> int:
    """A setting that counts tokens. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(
            f"kvplug: {name} must be a number of tokens, at least 0 and below "
            f"2 ** {limit.bit_length() - 1}, got {value!r}; "
            f'write {{"{name}": {DEFAULT_MIN_CONTEXT}}}'
        )
    return value


def _spans(value: object) -> tuple[Span, ...]:
    """A number n protects the first n tokens; a list of [first, last) protects those spans."""
    if isinstance(value, int) and not isinstance(value, bool):
        return ((0, token_count(value, "protect", FARTHEST)),) if value else ()
    spans = []
    for span in value if isinstance(value, (list, tuple)) else [value]:
        if (
            not isinstance(span, (list, tuple))
            or len(span) != 2
            or not all(isinstance(n, int) and not isinstance(n, bool) for n in span)
            or not 0 <= span[0] < span[1] < FARTHEST
        ):
            raise ValueError(
                "kvplug: protect must be a number of first tokens or a list of spans "
                f"[first, last) with 0 <= first < last < 2 ** 24, got {value!r}; write "
                '{"protect": 256} or {"protect": [[0, 256]]}'
            )
        spans.append((span[0], span[1]))
    return tuple(sorted(spans))
