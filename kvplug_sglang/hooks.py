"""All that a serving process hooks, and when."""

from __future__ import annotations

from typing import Any

from kvplug_sglang import (
    admission,
    blending,
    cache,
    coded_pool,
    compat,
    packing,
    replay,
    streaming,
)
from kvplug_sglang.settings import Engine

HOOKS = (
    *packing.HOOKS,
    *admission.HOOKS,
    *streaming.HOOKS,
    *blending.HOOKS,
    *replay.HOOKS,
    compat.Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "around",
        cache.token_bytes,
        ("self", "kvc", "num_layers"),
    ),
    compat.Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator.calculate_pool_sizes",
        "around",
        coded_pool.less_open_pages,
        ("self", "available_bytes", "page_size"),
    ),
    compat.Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._resolve_kv_pool_class",
        "around",
        coded_pool.pool_class,
        ("self", "kind", "default"),
    ),
)


def enter(server_args: Any) -> None:
    """Before a scheduler is built in this process. Raises RuntimeError for a hook that is gone."""
    compat.place(HOOKS)
    Engine.enter(compat.page_size(server_args), compat.rank())
