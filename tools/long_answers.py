"""What policies lose that pack answers as they grow: real text forced through decoding.

    make setup models
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/long_answers.py

Three texts of Python's own (documentation, and source), of which the first tokens are a prompt and
the others are fed as the model's answer; the loss is the model's -log p of them, in nats a token.
Minutes for each policy; float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean

from kvplug_evals.engines.interface import EngineOptions, Request
from kvplug_evals.engines.vllm import VLLMEngine

TEXTS = (
    topics["typesseq"] + topics["formatstrings"],
    Path(argparse.__file__).read_text(),
    topics["objects"] + topics["class"] + topics["specialnames"],
)
POLICIES = (
    "dense",
    "snapkv(budget=384, window=64, interval=128)",
    "r_kv(budget=384)",
    "tova(budget=384)",
    "keydiff(budget=384, interval=128)",
    "lagkv(budget=384, interval=128)",
    "cur(budget=384, interval=128)",
    "vase(budget=384, interval=128)",
    "random(budget=384, interval=128)",
    "streaming_llm(sinks=4, window=508)",
)


def losses(
    policy: str, model: Path, prompt: int, answer: int, multiprocess: bool = True
) -> tuple[list[float], int]:
    """Mean loss of each text's answer, and the blocks that all held while they decoded.
    multiprocess: as of ``EngineOptions``"""
    options = EngineOptions(
        model=str(model), max_model_len=prompt + answer + 8, max_num_seqs=len(TEXTS),
        dtype="float32", multiprocess=multiprocess,
    )  # fmt: skip
    engine = VLLMEngine(policy, options)
    tokens = [engine.tokenizer.encode(text)[: prompt + answer] for text in TEXTS]
    requests = [
        Request(key=str(n), prompt=each[:prompt], forced=each[prompt:], scored=answer)
        for n, each in enumerate(tokens)
    ]
    wave = engine.run(requests)
    engine.close()
    replies = sorted(wave.replies, key=lambda reply: reply.key)
    return [mean(reply.losses) for reply in replies], wave.held_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2"))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=1024)
    parser.add_argument("policies", nargs="*", default=POLICIES)
    given = parser.parse_args()
    for policy in given.policies:
        found, blocks = losses(policy, given.model, given.prompt, given.answer)
        shown = ", ".join(f"{loss:.3f}" for loss in found)
        print(f"{mean(found):.3f} ({shown}), {blocks} blocks: {policy}", flush=True)


if __name__ == "__main__":
    main()
