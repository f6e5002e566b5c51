"""What chunks that were read alone lose, and what they spare, beside the whole prompt.

    make setup models
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/reused_chunks.py

Four chunks of Python's documentation. *goes on*: a text whose beginning they are; *quotes*: four
from anywhere, and behind them a quote from one of the later three. Printed are the nats of the
last tokens above dense, their mean and the middle nine tenths of it by resampling texts; tokens
computed; and the seconds to the first token, one request at a time. *look-ups*: exact recall over
a context cut into four. Some minutes for each policy.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, median

from kvplug_evals.engines.interface import EngineOptions, Reply, Request
from kvplug_evals.engines.vllm import VLLMEngine
from kvplug_evals.models.recall import recall_prompt

CHUNKS, SCORED, QUOTED, HOPS = 4, 64, 32, 4
SAID = "\n\nAs said above: "
POLICIES = ("dense", "blend(links=8)", "blend(links=0)")


@dataclass(frozen=True)
class Found:
    replies: list[Reply]
    seconds: list[float]


def spans(size: int) -> list[tuple[int, int]]:
    return [(n * size, (n + 1) * size) for n in range(CHUNKS)]


def texts(model: Path, tokens: int, count: int) -> Iterator[tuple[str, Request]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = "\n\n".join(text for _, text in sorted(topics.items()))
    ids, said = tokenizer(words)["input_ids"], tokenizer(SAID)["input_ids"]
    size, drawn = tokens // CHUNKS, random.Random(0)
    for number in range(count):
        start = drawn.randrange(len(ids) - tokens - QUOTED - SCORED)
        context = ids[start : start + tokens + QUOTED + SCORED]
        yield "goes on", request(f"goes on {number}", context, size)
        begin = [drawn.randrange(len(ids) - size) for _ in range(CHUNKS)]
        chunks = [ids[place : place + size] for place in begin]
        offset = drawn.randrange(60, size - QUOTED - SCORED)
        quote = drawn.choice(chunks[1:])[offset : offset + QUOTED + SCORED]
        whole = [token for chunk in chunks for token in chunk]
        yield "quotes", request(f"quotes {number}", [*whole, *said, *quote], size)


def request(key: str, tokens: Sequence[int], size: int) -> Request:
    prompt, forced = list(tokens[:-SCORED]), list(tokens[-SCORED:])
    return Request(key=key, prompt=prompt, forced=forced, scored=SCORED, chunks=spans(size))


def lookups(tokens: int) -> list[Request]:
    prompt = recall_prompt(tokens, tokens // 8, 12, 0, hops=HOPS)
    return [
        Request(
            key=str(n), prompt=[*prompt.tokens, asked], forced=answers, scored=HOPS,
            chunks=spans(tokens // CHUNKS),
        )
        for n, (asked, answers) in enumerate(zip(prompt.questions, prompt.answers, strict=True))
    ]  # fmt: skip


def ask(policy: str, model: Path, tokens: int, asked: list[Request], timed: int) -> Found:
    """Every request with nothing cached but its chunks; the first ``timed`` once more, alone."""
    options = EngineOptions(
        model=str(model), max_model_len=tokens + 512, max_num_seqs=4, dtype="float32",
        multiprocess=False,
    )  # fmt: skip
    engine, replies, seconds = VLLMEngine(policy, options), [], []
    for one in asked:
        engine.forget()
        replies += engine.run([one]).replies
    for one in asked[:timed]:
        engine.forget()
        (reply,) = engine.run([replace(one, forced=[], scored=0, new_tokens=1)]).replies
        seconds.append(reply.first_token_seconds)
    engine.close()
    return Found(replies, seconds)


def middle(values: list[float]) -> tuple[float, float]:
    drawn = random.Random(0)
    means = sorted(mean(drawn.choices(values, k=len(values))) for _ in range(2000))
    return means[100], means[-100]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2"))
    parser.add_argument("--recall", type=Path, default=Path(".models/recall"))
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--timed", type=int, default=3)
    parser.add_argument("policies", nargs="*", default=POLICIES)
    given = parser.parse_args()
    drawn = list(texts(given.model, given.tokens, given.texts))
    whole = given.tokens // 128 * 128
    dense: list[float] = []
    for policy in given.policies:
        asked = [one for _, one in drawn]
        found = ask(policy, given.model, given.tokens, asked, given.timed)
        losses = [mean(reply.losses) for reply in found.replies]
        dense = dense or losses
        for kind in ("goes on", "quotes"):
            mine = [n for n, (what, _) in enumerate(drawn) if what == kind]
            more = [losses[n] - dense[n] for n in mine]
            low, high = middle(more)
            print(
                f"{policy}: {kind}: {mean(losses[n] for n in mine):.3f} nats, {mean(more):+.3f} "
                f"[{low:+.3f}, {high:+.3f}] over {len(mine)} texts",
                flush=True,
            )
        tokens = mean(reply.prompt_tokens for reply in found.replies)
        cached = mean(reply.cached_tokens for reply in found.replies)
        first = f", first after {median(found.seconds):.2f} s" if found.seconds else ""
        print(
            f"{policy}: {tokens - cached:.0f} of {tokens:.0f} tokens computed{first}", flush=True
        )
        hops = ask(policy, given.recall, whole, lookups(whole), 0)
        right = [each for reply in hops.replies for each in reply.agreed]
        print(f"{policy}: {sum(right)} of {len(right)} look-ups", flush=True)


if __name__ == "__main__":
    main()
