"""Turns over one context: what a server keeps of it between them decides.

Engines' own generators for this are not in their wheels, and want the context's text of their own.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import median

from kvplug_evals.bench.load import Sent
from kvplug_evals.served.client import Client, Completion
from kvplug_evals.served.engine import Engine

WORDS = 8
"""Of a question: words of the context, one after the other, which an answer goes on from."""
STRIDE = 101
"""Words from one question to the next, a prime."""
QUESTION_TOKENS = 4 * WORDS
"""More than those words have."""


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Clients who each ask a turn after the other, all at the same time."""

    context: str
    clients: int
    turns: int
    output: int

    def question(self, client: int, turn: int) -> str:
        words = self.context.split()
        begin = (turn * self.clients + client + 1) * STRIDE % max(len(words) - WORDS, 1)
        return " ".join(words[begin : begin + WORDS])


def converse(load: Conversations, engine: Engine, url: str) -> tuple[Sent, float]:
    """What the clients felt, times to first tokens of later turns alone, and the share of later
    prompts that was cached. Raises httpx.HTTPError."""
    return asyncio.run(_converse(load, engine, url))


async def _converse(load: Conversations, engine: Engine, url: str) -> tuple[Sent, float]:
    async with Client.of(engine, url) as client:

        async def ask(number: int) -> list[Completion]:
            text, answers = load.context, []
            for turn in range(load.turns):
                text = f"{text} {load.question(number, turn)}"
                answers.append(await client.complete(text, load.output))
                text += answers[-1].text
            return answers

        began = time.monotonic()
        asked = await asyncio.gather(*map(ask, range(load.clients)))
        seconds = time.monotonic() - began
    every = [answer for answers in asked for answer in answers]
    later = [answer for answers in asked for answer in answers[1:]]
    tpot = median(answer.token_seconds for answer in every)
    sent = Sent(
        output_tokens_per_second=sum(answer.output_tokens for answer in every) / seconds,
        ttft_ms=1000 * median(answer.first_token_seconds for answer in later),
        tpot_ms=1000 * tpot,
        itl_ms=1000 * tpot,
        replies=[answer.text for answer in every],
    )
    prompts = sum(answer.prompt_tokens for answer in later)
    return sent, sum(answer.cached_tokens for answer in later) / prompts
