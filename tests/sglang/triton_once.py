"""Serve prompts over SGLang's interpreted Triton kernels, under each settings; null for without
kvplug. Prints what each did, as JSON."""

import json
import sys
from pathlib import Path

from conftest import start


def main(model: str, prompts: str, cases: list[str]) -> None:
    from interpreter import patch_once

    patch_once()
    batch, found = json.loads(prompts), []
    options = {
        "chunked_prefill_size": 64,
        "context_length": 512,
        "triton_attention_num_kv_splits": 2,
        "disable_hybrid_swa_memory": True,
    }
    for settings in map(json.loads, cases):
        policy = None if settings is None else json.dumps(settings)
        stock = {"attention_backend": "triton"} if settings is None else {}
        with start(Path(model), policy, **options, **stock) as engine:
            answers = engine.generate(batch, 3)
            backend = engine.backend
            found.append(
                {
                    "answers": answers,
                    "backend": type(backend).__module__,
                    "selected": getattr(backend, "selected_queries", 0),
                    "packed": getattr(backend, "packed_prompts", 0),
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
