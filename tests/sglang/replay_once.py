"""Serve cases with decode steps replayed from recorded graphs. Prints what each did, as JSON.

Over SGLang's Triton backend, or over its FlashAttention 3 where ``KVPLUG_TEST_FLASH`` is set.
A case: [server's settings, requests' own policies or null for each prompt].
"""

import json
import os
import sys
from pathlib import Path

from conftest import start


def main(model: str, prompts: str, tokens: str, cases: list[str]) -> None:
    from interpreter import patch_once
    from recorded_graph import capture

    patch_once()

    if "KVPLUG_TEST_FLASH" in os.environ:
        import flash

        flash.install()
    batch, found = json.loads(prompts), []
    options = {
        "chunked_prefill_size": 64,
        "context_length": 512,
        "triton_attention_num_kv_splits": 2,  # each is a program, which the interpreter is slow at
    }
    for settings, chosen in map(json.loads, cases):
        with start(Path(model), settings, **options) as engine:
            graphs = capture(engine.scheduler.tp_worker.model_runner)
            waves = []
            for _ in range(2):  # rows, slots and lengths of the second are others
                rids = [
                    engine.send(prompt, int(tokens), policy)
                    for prompt, policy in zip(batch, chosen, strict=True)
                ]
                engine.drain()
                waves.append([engine.output(rid) for rid in rids])
            backend = type(engine.backend).__module__
            found.append(
                {
                    "waves": waves,
                    "replays": graphs.replays,
                    "backend": backend,
                    "counted": engine.counted()["decode_queries"],
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
