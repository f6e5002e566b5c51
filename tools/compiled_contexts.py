"""What is found in contexts of which a part was kept before anyone asked.

    make setup models
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/compiled_contexts.py

Exact recall: the prompt is the context, and its questions are fed as the model's own words, so
that it is compressed without them. Printed is the share of look-ups that come out
right, each asked with the true one before it, and the blocks that all requests held. Seconds for
each policy, and a minute for its engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from kvplug_evals.engines.interface import EngineOptions, Request
from kvplug_evals.engines.vllm import VLLMEngine
from kvplug_evals.models.recall import recall_prompt

HOPS, TAIL = 4, 32  # tokens behind the last whole chunk


def policies(tokens: int, share: float) -> list[str]:
    """Equal bytes: of whole chunks a share, of what is behind them all."""
    return [
        f"kvzip(budget={share}, chunk=512)",
        f"keydiff(budget={share}, chunk=512)",
        f"random(budget={share}, chunk=512)",
        f"snapkv(budget={int(tokens * share) + TAIL})",
        f"keydiff(budget={int(tokens * share) + TAIL})",
    ]


def found(policy: str, model: Path, tokens: int, contexts: int) -> tuple[float, int]:
    options = EngineOptions(
        model=str(model), max_model_len=tokens + 1024, max_num_seqs=12, dtype="float32",
        multiprocess=False,
    )  # fmt: skip
    engine = VLLMEngine(policy, options)
    hits: list[bool] = []
    for seed in range(contexts):
        prompt = recall_prompt(tokens + TAIL, tokens // 8, 12, seed, hops=HOPS)
        wave = engine.run(
            [
                Request(key=str(n), prompt=prompt.tokens, forced=[asked, *answers], scored=HOPS)
                for n, (asked, answers) in enumerate(
                    zip(prompt.questions, prompt.answers, strict=True)
                )
            ]
        )
        hits += [right for reply in wave.replies for right in reply.agreed]
    engine.close()
    return mean(hits), wave.held_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/recall"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--share", type=float, action="append")
    parser.add_argument("policies", nargs="*")
    given = parser.parse_args()
    for share in given.share or (0.25, 0.5):
        for policy in given.policies or ["dense", *policies(given.tokens, share)]:
            right, blocks = found(policy, given.model, given.tokens, given.contexts)
            print(f"{share:.0%}: {right:.0%} found, {blocks} blocks: {policy}", flush=True)


if __name__ == "__main__":
    main()
