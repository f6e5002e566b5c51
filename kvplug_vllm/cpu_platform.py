"""vLLM's CPU platform, except that it honours ``--attention-backend kvplug``."""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from kvplug_vllm import compat
from kvplug_vllm.settings import NAME

_Stock: Any = resolve_obj_by_qualname(cpu_platform_plugin())  # CpuPlatform or ZenCpuPlatform


class KVPlugCpuPlatform(_Stock):
    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is None or selected_backend.name != NAME:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        return compat.select_backend(selected_backend, attn_selector_config)

    get_attn_backend_cls._kvplug = True  # type: ignore[attr-defined]
