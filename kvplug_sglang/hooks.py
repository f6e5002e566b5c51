"""All that a serving process hooks, and when."""

from __future__ import annotations

from typing import Any

from kvplug_sglang import admission, cache, compat, packing, replay, streaming
from kvplug_sglang.settings import Engine

HOOKS = (
    *packing.HOOKS,
    *admission.HOOKS,
    *streaming.HOOKS,
    *replay.HOOKS,
    compat.Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "around",
        cache.token_bytes,
        ("self", "kvc", "num_layers"),
    ),
)


def enter(server_args: Any) -> None:
    """Before a scheduler is built in this process. Raises RuntimeError for a hook that is gone."""
    compat.place(HOOKS)
    Engine.enter(compat.page_size(server_args), compat.rank())
