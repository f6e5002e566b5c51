"""Names for policies: entry points of the group ``kvplug.policies``, ours and others'."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from kvplug.policy import Policy

GROUP = "kvplug.policies"


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint to append to an error: the nearest known name and the list of all."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(known)}."


def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ValueError(
                f"two packages register the policy {entry.name!r}: {other.value} and "
                f"{entry.value}; "
                "uninstall one or rename its entry point"
            )
    return found


def policy_names() -> list[str]:
    """Every installed policy, sorted."""
    return sorted(_entries())


@cache
def policy_class(name: str) -> type[Policy]:
    """The class behind a name. Raises ValueError for an unknown name or a wrong class."""
    entries = _entries()
    if name not in entries:
        raise ValueError(f"unknown policy {name!r}.{did_you_mean(name, sorted(entries))}")
    loaded = entries[name].load()
    if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
        raise ValueError(
            f"policy {name!r} ({entries[name].value}) must be a subclass of kvplug.Policy, "
            f"got {loaded!r}"
        )
    own = getattr(loaded, "name", None)
    if own != name:
        raise ValueError(
            f"policy {name!r} ({entries[name].value}) calls itself {own!r}: "
            "give the class attribute `name` and the entry point the same value"
        )
    return loaded
