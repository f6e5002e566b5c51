"""What the engine that this process serves was asked for, and what its requests may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, ClassVar

from kvplug import Offer, Planner, Settings, read_offer
from kvplug.config import ENVIRONMENT, stand_in
from kvplug.offer import SERVER_KEYS

NAME = "KVPLUG"
LEVEL = "kvplug"
"""Of ``--additional-config``, under which kvplug's settings stand."""
REQUEST_FIELD = "kvplug"
"""``vllm_xargs={"kvplug": "snapkv(budget=512)"}``, ``SamplingParams(extra_args=...)``."""

COMPILED = "kvplug.compiled"
TAKEN = "kvplug.taken"


def selected(vllm_config: Any) -> bool:
    """Whether the configuration asks for kvplug."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == NAME


def offer_of(vllm_config: Any) -> Offer:
    """``--additional-config '{"kvplug": {...}}'`` -> what the server offers. Raises ValueError."""
    given = _additional(vllm_config)
    if LEVEL not in given and (stray := [*_misspelt(given), *_without_level(given)]):
        raise ValueError(
            f"--additional-config has {_listed(stray)} and no {LEVEL!r}, so that the default "
            f'policy would be served; write {{"{LEVEL}": {{"policy": "…"}}}}'
        )
    return read_offer(given.get(LEVEL))


def resolve(vllm_config: Any) -> None:
    """Write what stands in for a policy, KVPLUG_POLICY or the default, into the configuration:
    every process of the engine, and every later moment, reads what was read at its start."""
    offer = offer_of(vllm_config)
    if isinstance(vllm_config.additional_config, dict):
        own = {"policy": str(offer.settings.policy), "min_context": offer.settings.min_context}
        given = _additional(vllm_config)
        vllm_config.additional_config = {**given, LEVEL: {**(given.get(LEVEL) or {}), **own}}


def without_effect(vllm_config: Any) -> Iterator[str]:
    """What the user wrote for kvplug and nothing applies, in the user's words."""
    given = _additional(vllm_config)
    if selected(vllm_config):
        if LEVEL in given and (stray := [*_misspelt(given), *_without_level(given)]):
            yield f"{_listed(stray)} of --additional-config: only what is under {LEVEL!r} is read"
        return
    needs = "needs --attention-backend kvplug"
    if stray := [*([LEVEL] if LEVEL in given else []), *_misspelt(given)]:
        yield f"{_listed(stray)} of --additional-config: {needs}"
    if (line := stand_in()) is not None:
        yield f"{ENVIRONMENT}={line}: {needs}"


def _additional(vllm_config: Any) -> dict[str, Any]:
    given = vllm_config.additional_config
    return given if isinstance(given, dict) else {}


def _misspelt(given: dict[str, Any]) -> list[str]:
    return [
        key
        for key in map(str, given)
        if key != LEVEL and get_close_matches(key.lower(), [LEVEL], 1, 0.8)
    ]


def _without_level(given: dict[str, Any]) -> list[str]:
    return [key for key in given if key in SERVER_KEYS]


def _listed(keys: list[str]) -> str:
    return ", ".join(map(repr, keys))


def asked_for(sampling_params: Any) -> object:
    """What a request says to kvplug; None for nothing."""
    return (getattr(sampling_params, "extra_args", None) or {}).get(REQUEST_FIELD)


def compiled_for(sampling_params: Any) -> int:
    """Chunks at its start that a request found compiled, as it was last admitted."""
    return int((sampling_params.extra_args or {}).get(COMPILED, 0))


def tell_compiled(sampling_params: Any, chunks: int) -> None:
    """From a scheduler to its workers. What a user writes there, each look-up writes over."""
    sampling_params.extra_args = {**(sampling_params.extra_args or {}), COMPILED: chunks}


@dataclass(frozen=True)
class Taken:
    """Blocks that a request takes from the cache, as it was last admitted; it lies as arranged."""

    ticket: int
    """Of an admission: the later, the higher."""
    sources: list[int]
    into: list[int]
    """Its own blocks, as many."""
    shifts: list[int]
    """Tokens that the keys of each move by."""


def taken_for(sampling_params: Any) -> Taken | None:
    """What a request takes, None where it lies in order."""
    told = (sampling_params.extra_args or {}).get(TAKEN)
    return None if told is None else Taken(**told)


def tell_taken(sampling_params: Any, taken: Taken | None) -> None:
    """From a scheduler to its workers, as ``tell_compiled``."""
    told = None if taken is None else asdict(taken)
    sampling_params.extra_args = {**(sampling_params.extra_args or {}), TAKEN: told}


@dataclass(frozen=True)
class Engine:
    """What the hooks that vLLM calls without a configuration need to know.

    vLLM builds the attention layers with a configuration in scope and asks the backend for its
    cache spec later, without one: the layers leave it here.
    """

    vllm_config: Any
    offer: Offer
    announced: set[str] = field(default_factory=set, compare=False)
    """Lines that its log has: builders are made for a profile too."""
    layers: set[str] = field(default_factory=set, compare=False)
    """Names of the model's own, once they are all there: later ones are its drafter's."""

    current: ClassVar[Engine | None] = None

    @property
    def settings(self) -> Settings:
        return self.offer.settings

    @classmethod
    def enter(cls, vllm_config: Any) -> Engine:
        if cls.current is None or not cls.serves(vllm_config):
            cls.current = cls(vllm_config, offer_of(vllm_config))
        return cls.current

    @classmethod
    def serves(cls, vllm_config: Any) -> bool:
        """Whether the configuration is this engine's, or one that vLLM makes of it to load a
        drafter: those have its own drafter."""
        if cls.current is None:
            return False
        own, drafts = cls.current.vllm_config, vllm_config.speculative_config
        return own is vllm_config or (drafts is not None and drafts is own.speculative_config)


@dataclass(frozen=True, kw_only=True)
class EvictionSettings:
    """An offer as plain values: specs are compared, hashed and sent between processes."""

    policy: str
    min_context: int
    protect: tuple[tuple[int, int], ...]
    shortcut: bool = True
    allow: tuple[str, ...] = ()
    max_budget: int | None = None

    @classmethod
    def of(cls, offer: Offer) -> EvictionSettings:
        own = offer.settings
        return cls(
            policy=str(own.policy),
            min_context=own.min_context,
            protect=own.protect,
            shortcut=own.shortcut,
            allow=offer.allow,
            max_budget=offer.max_budget,
        )

    @cache  # noqa: B019 -- frozen, hashable and as few as the engine's groups
    def offer(self) -> Offer:
        return read_offer(asdict(self), environ={})

    @cache  # noqa: B019 -- as above
    def planner(self, page_size: int) -> Planner:
        return Planner(self.offer().settings, page_size)
