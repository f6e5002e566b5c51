"""How long answers in codes are those of plain pages: greedy tokens of six texts of SmolLM2's.

    make setup models
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/same_words.py

Six pieces of Python's own documentation, of 500 to 685 tokens, each with an answer of 64 greedy
tokens, all at once through vLLM in float32; for each line the tokens before the first that dense
has not said. A minute for each line.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from kvplug_evals.engines.interface import EngineOptions, Request
from kvplug_evals.engines.vllm import VLLMEngine

LINES = ("kivi(bits=8)",)
TEXTS, ANSWER = 6, 64


def answers(line: str, model: Path) -> list[list[int]]:
    options = EngineOptions(
        model=str(model), max_model_len=1024, max_num_seqs=TEXTS, dtype="float32",
        multiprocess=False,
    )  # fmt: skip
    engine = VLLMEngine(line, options)
    tokens = engine.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    apart = len(tokens) // TEXTS
    prompts = [tokens[n * apart :][: 500 + 37 * n] for n in range(TEXTS)]
    wave = engine.run(
        [Request(key=str(n), prompt=prompt, new_tokens=ANSWER) for n, prompt in enumerate(prompts)]
    )
    engine.close()
    return [reply.tokens for reply in sorted(wave.replies, key=lambda reply: reply.key)]


def same(answer: list[int], expected: list[int]) -> int:
    pairs = enumerate(zip(answer, expected, strict=False))  # one may have ended before
    return next((n for n, (one, other) in pairs if one != other), min(len(answer), len(expected)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2"))
    parser.add_argument("lines", nargs="*", default=LINES)
    given = parser.parse_args()
    dense = answers("dense", given.model)
    for line in given.lines:
        found = zip(answers(line, given.model), dense, strict=True)
        shown = (f"{same(one, other)} of {len(other)}" for one, other in found)
        print(f"{line}: as dense {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
