"""Serve prompts in vLLM, in the environment that has it. Prints each policy's tokens, as JSON."""

import importlib.util
import json
import sys
from pathlib import Path


def main(model: str, prompts: str, policies: list[str]) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "stand_ins"))
    spec = importlib.util.spec_from_file_location(
        "vllm_engine", Path(__file__).parents[1] / "vllm" / "conftest.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for policy in policies:
        with module.start(Path(model), {"policy": policy}) as engine:
            found[policy] = engine.generate(json.loads(prompts), 16)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
