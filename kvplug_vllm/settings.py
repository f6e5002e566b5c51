"""The settings of the engine that this process serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvplug import Settings, read_settings


def settings_of(vllm_config: Any) -> Settings:
    """``--additional-config '{"kvplug": {...}}'`` -> settings. Raises ValueError."""
    given = vllm_config.additional_config
    return read_settings(given.get("kvplug") if isinstance(given, dict) else None)


@dataclass(frozen=True)
class Engine:
    """What the hooks that vLLM calls without a configuration need to know.

    vLLM builds the attention layers with a configuration in scope and asks the backend for its
    cache spec later, without one: the layers leave it here.
    """

    vllm_config: Any
    settings: Settings

    current: ClassVar[Engine | None] = None

    @classmethod
    def enter(cls, vllm_config: Any) -> Engine:
        if cls.current is None or cls.current.vllm_config is not vllm_config:
            cls.current = cls(vllm_config, settings_of(vllm_config))
        return cls.current
