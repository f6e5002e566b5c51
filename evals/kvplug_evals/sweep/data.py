"""lm-eval's tasks with their documents, made once: all policies get the same questions."""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from typing import Any

import numpy as np

from kvplug_evals.sweep.settings import Setting, folder, ours

SEED = 1234
"""Of lm-eval's random, numpy and torch."""
LEAST = 1024
"""Of RULER's tokens: below it some generators look for a shorter text for ever, deaf to Ctrl-C."""


def load(name: str, setting: Setting, options: dict[str, Any]) -> list[Any]:
    """lm-eval's Tasks of a name or group. Raises ValueError."""
    suite = setting.suite
    if name.startswith(("ruler", "niah_")) and setting.tokens < LEAST:
        raise ValueError(f"{name} needs --tokens {LEAST} or more, got {setting.tokens}")
    metadata: dict[str, Any] = {
        "pretrained": setting.model,
        "max_seq_lengths": [setting.tokens],  # of lm-eval's RULER
        **options,
    }
    if ours(name):
        metadata |= {
            "data": suite.data,
            "tokens": setting.tokens,
            "contexts": suite.contexts,
            "turns": suite.turns,
            "mode": setting.mode,
            "seed": suite.seed,
            **options,
        }
    if setting.compressor:
        metadata["compressor"] = setting.policy
    return _made(name, json.dumps(metadata, sort_keys=True))


@cache
def _made(name: str, metadata: str) -> list[Any]:
    """RULER draws 500 documents for every length, however few are asked: half a minute each."""
    manager = _manager(not ours(name), metadata)
    for module in [m for m in sys.modules if m.startswith("lm_eval.tasks.ruler.")]:
        del sys.modules[module]  # ruler_cwe shuffles by a generator that is never seeded again
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        return list(manager.load([name])["tasks"].values())
    except KeyError as error:
        raise ValueError(
            f"there is no task {name!r} ({error.args[0]}); `lm_eval ls tasks --include_path "
            "evals/tasks` names those there are"
        ) from None


@cache
def _manager(include_defaults: bool, metadata: str) -> Any:
    """To read all of lm-eval's tasks takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=str(folder("tasks")),
        include_defaults=include_defaults,
        metadata=json.loads(metadata),
    )
