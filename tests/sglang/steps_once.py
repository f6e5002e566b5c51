"""Serve waves of requests whose number and lengths change, decode steps replayed. Prints what
tensors kvplug held once it was warm and after many steps more, and how many these were, as JSON.
"""

import importlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from conftest import start

PLAIN = ("page_bound", "page_select", "virtual_heads", "page_digest")
WARM, STEPS = 80, 200


def held(*owners: Any) -> dict[str, int]:
    """Storages of the tensors that kvplug's objects hold, down to the engine's."""
    found, seen, left = {}, set(), list(owners)
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, dict):
            left += each.values()
        elif isinstance(each, (list, tuple, set)):
            left += each
        elif type(each).__module__.startswith("kvplug"):
            left += vars(each).values() if hasattr(each, "__dict__") else ()
    return {"storages": len(found), "bytes": sum(found.values())}


def main(model: str, policy: str) -> None:
    # SGLang's kernels stay interpreted, in place of kvplug's stand their references.
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    import flash
    from cuda_path import NAMES
    from recorded import opaque

    for name in PLAIN:
        function = NAMES.get(name, name)
        module = importlib.import_module(f"kvplug_kernels.{name}")
        setattr(module, function, opaque(getattr(module, function)))
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

        def arrive() -> None:
            if chance.random() < 0.2 and len(engine._inbox) < 3:
                prompt = [chance.randrange(512) for _ in range(chance.randint(1, 200))]
                engine.send(prompt, chance.randint(1, 12))

        def serve(steps: int) -> dict[str, int]:
            kinds.clear()
            engine.steps[:] = [lambda: arrive() if sum(kinds.values()) < steps else None]
            while sum(kinds.values()) < steps:
                for _ in range(chance.randint(1, 6)):
                    engine.send([1, 2, 3], chance.randint(2, 6))
                engine.drain()
            engine.backend.plans, engine.backend.forward_metadata = [], None  # of the last step
            return held(engine.backend, Engine.serving())

        warm, before = serve(WARM), graphs.replays
        after = serve(STEPS)
        found = {"warm": warm, "after": after, "steps": kinds, "replays": graphs.replays - before}
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
