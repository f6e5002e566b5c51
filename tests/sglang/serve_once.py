"""Serve prompts in a scheduler of this process. Prints its backend and the tokens, as JSON."""

import json
import sys
from pathlib import Path

from conftest import start


def main(model: str, prompts: str, tokens: str, policies: list[str]) -> None:
    found = {}
    for policy in policies:
        with start(Path(model), policy, chunked_prefill_size=64) as engine:
            found[policy] = engine.generate(json.loads(prompts), int(tokens))
            backend = type(engine.backend).__module__
    print(json.dumps([backend, found]))


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
