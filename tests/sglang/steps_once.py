"""Serve waves of requests whose number and lengths change, decode steps replayed. Prints what
tensors kvplug held once it was warm and after many steps more, and how many these were, as JSON.

The later steps have shapes that the first had not: what is kept for each shape is new then.
"""

import importlib
import json
import os
import random
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
import triton
from conftest import start

PLAIN = ("page_bound", "page_select", "virtual_heads", "page_digest")
WARM, STEPS = 50, 200


def held(**owners: Any) -> dict[str, int]:
    """Bytes of the tensors that kvplug's objects and modules hold, down to the engine's, each by
    the first way to it."""
    found, known, seen = {}, set(), set()
    left = [*owners.items()]
    left += [(name, each) for name, each in sys.modules.items() if name.startswith("kvplug")]
    for name, each in left:
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            if storage.data_ptr() not in known:
                found[name] = storage.nbytes()
            known.add(storage.data_ptr())
        elif isinstance(each, dict):
            left += [(f"{name}[{key}]", value) for key, value in each.items()]
        elif isinstance(each, (list, tuple, set)):
            left += [(f"{name}[{place}]", value) for place, value in enumerate(each)]
        elif of_kvplug(each):
            mine = vars(each) if hasattr(each, "__dict__") else {}
            left += [(f"{name}.{key}", value) for key, value in mine.items()]
            cells = getattr(each, "__closure__", None) or ()
            left += [(f"{name}()", cell.cell_contents) for cell in cells]
    return found


def of_kvplug(each: Any) -> bool:
    """One of its objects, classes, functions or modules."""
    if isinstance(each, ModuleType):
        return each.__name__.startswith("kvplug")
    named = each if isinstance(each, (type, FunctionType)) else type(each)
    return str(named.__module__).startswith("kvplug")


def main(model: str, policy: str) -> None:
    # SGLang's kernels stay interpreted, in place of kvplug's stand their references.
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    import flash
    from cuda_path import NAMES
    from interpreter import patch_once
    from recorded import opaque

    for name in PLAIN:
        function = NAMES.get(name, name)
        module = importlib.import_module(f"kvplug_kernels.{name}")
        setattr(module, function, opaque(getattr(module, function)))
    patch_once()
    flash.install()
    from recorded_graph import capture

    from kvplug_sglang.settings import Engine

    chance = random.Random(5)
    with start(Path(model), policy, chunked_prefill_size=64, context_length=512) as engine:
        graphs = capture(engine.scheduler.tp_worker.model_runner, [1, 2, 4, 8])
        kinds: dict[str, int] = {}
        run = engine.scheduler.run_batch

        def count(batch, *args, **kwargs):
            kinds[batch.forward_mode.name] = kinds.get(batch.forward_mode.name, 0) + 1
            return run(batch, *args, **kwargs)

        engine.scheduler.run_batch = count

        def arrive(longest: int) -> None:
            if chance.random() < 0.2 and len(engine._inbox) < 3:
                prompt = [chance.randrange(512) for _ in range(chance.randint(1, longest))]
                engine.send(prompt, chance.randint(1, 12))

        def serve(steps: int, longest: int, most: int) -> dict[str, int]:
            kinds.clear()
            engine.steps[:] = [lambda: arrive(longest) if sum(kinds.values()) < steps else None]
            while sum(kinds.values()) < steps:
                for _ in range(chance.randint(1, most)):
                    engine.send([1, 2, 3], chance.randint(2, 6))
                engine.drain()
            of_the_last_step = {"plans": [], "forward_metadata": None, "strided_indices": None}
            vars(engine.backend).update(of_the_last_step)
            return held(backend=engine.backend, engine=Engine.serving())

        warm, before = serve(WARM, longest=100, most=2), graphs.replays
        after = serve(STEPS, longest=200, most=6)
        found = {"warm": warm, "after": after, "steps": kinds, "replays": graphs.replays - before}
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
