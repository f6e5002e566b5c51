"""Serve cases with decode steps replayed from recorded graphs. Prints what each did, as JSON.

A case: ["triton" or "flash" for SGLang's attention of that name, whether kvplug's kernels are
interpreted or their references stand for them, server's settings, requests' own policies or null
for each prompt, page size, prompts that are served before, prompts].
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from conftest import start


def by_case(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that a capture looks into, or its reference, which waits for its tensors."""
    from recorded import opaque

    from kvplug_kernels.dispatch import interpreted

    whole = opaque(function)
    return lambda *args, **kwargs: (function if interpreted() else whole)(*args, **kwargs)


def main(model: str, tokens: str, cases: list[str]) -> None:
    triton.knobs.runtime.interpret = True  # whatever becomes of the variable
    import flash
    from cuda_path import NAMES, OPERATIONS
    from interpreter import patch_once
    from recorded_graph import capture

    for name in OPERATIONS:
        function = NAMES.get(name, name)
        module = importlib.import_module(f"kvplug_kernels.{name}")
        setattr(module, function, by_case(getattr(module, function)))
    from kvplug_sglang import backend

    patch_once()
    stocks = {"triton": backend.stock}
    flash.install()
    stocks["flash"] = backend.stock
    found = []
    options = {
        "chunked_prefill_size": 64,
        "context_length": 512,
        "triton_attention_num_kv_splits": 2,  # each is a program, which the interpreter is slow at
    }
    for stock, interpreted, settings, chosen, page_size, before, batch in map(json.loads, cases):
        backend.stock = stocks[stock]
        os.environ["TRITON_INTERPRET"] = str(int(interpreted))
        with start(Path(model), settings, **options, page_size=page_size) as engine:
            graphs = capture(engine.scheduler.tp_worker.model_runner)
            waves, cached = [], []
            for _ in range(2):  # rows, slots and lengths of the second are others
                engine.generate(before, 1)
                rids = [
                    engine.send(prompt, int(tokens), policy)
                    for prompt, policy in zip(batch, chosen, strict=True)
                ]
                engine.drain()
                waves.append([engine.output(rid) for rid in rids])
                cached.append(engine.cached(rids[0]))
            found.append(
                {
                    "waves": waves,
                    "cached": cached,
                    "replays": graphs.replays,
                    "backend": type(engine.backend).__module__,
                    "counted": engine.counted()["decode_queries"],
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:])
