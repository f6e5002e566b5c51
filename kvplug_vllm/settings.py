"""What the engine that this process serves was asked for, and what its requests may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvplug import Offer, Settings, read_offer
from kvplug_vllm import NAME, compat

REQUEST_FIELD = "kvplug"
"""``vllm_xargs={"kvplug": "snapkv(budget=512)"}``, ``SamplingParams(extra_args=...)``."""


def selected(vllm_config: Any) -> bool:
    """Whether the configuration asks for kvplug."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == NAME


def offer_of(vllm_config: Any) -> Offer:
    """``--additional-config '{"kvplug": {...}}'`` -> what the server offers. Raises ValueError."""
    given = vllm_config.additional_config
    return read_offer(given.get("kvplug") if isinstance(given, dict) else None)


def asked_for(sampling_params: Any) -> object:
    """What a request says to kvplug; None for nothing."""
    return (getattr(sampling_params, "extra_args", None) or {}).get(REQUEST_FIELD)


@dataclass(frozen=True)
class Engine:
    """What the hooks that vLLM calls without a configuration need to know.

    vLLM builds the attention layers with a configuration in scope and asks the backend for its
    cache spec later, without one: the layers leave it here. So does each new configuration, for
    the process that admits requests.
    """

    vllm_config: Any
    offer: Offer

    current: ClassVar[Engine | None] = None

    @property
    def settings(self) -> Settings:
        return self.offer.settings

    @classmethod
    def enter(cls, vllm_config: Any) -> Engine:
        if cls.current is None or cls.current.vllm_config is not vllm_config:
            cls.current = cls(vllm_config, offer_of(vllm_config))
        return cls.current

    @classmethod
    def configured(cls, vllm_config: Any) -> None:
        """vLLM has made a configuration: refuse what would be wrong before anything loads."""
        if selected(vllm_config):
            from kvplug_vllm.refusals import refuse, refuse_session

            refuse(vllm_config)
            cls.enter(vllm_config)
            compat.announce_sessions(refuse_session)
