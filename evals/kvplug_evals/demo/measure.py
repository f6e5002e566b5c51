"""What clients feel and what the engine says of itself, while a conversation runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvplug import parse
from kvplug_evals.demo.conversation import TURNS, Conversation, Question
from kvplug_evals.served.engine import NAME, Engine, EngineState

OUTPUT_TOKENS = 24
SAMPLE_SECONDS = 0.1
PATIENCE = 1800
"""Seconds for an answer: the last of the documents waits for all before it, minutes each on a CPU
that has no instructions for bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    question: Question
    text: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_seconds: float
    token_seconds: float
    """Per output token after the first."""

    @property
    def answer(self) -> str:
        return self.text.partition('"')[0]

    @property
    def right(self) -> bool:
        return self.answer == self.question.answer


@dataclass(frozen=True, kw_only=True)
class Turn:
    started: float
    """Seconds since the conversation's start."""
    seconds: float
    replies: list[Reply]
    queries: float
    cached: float
    read: float

    @property
    def read_per_step(self) -> float:
        return self.read / self.queries


@dataclass(kw_only=True)
class Row:
    """One policy's conversation, measured."""

    policy: str
    is_dense: bool
    start_seconds: float
    pool: int = 0
    fits: float | None = None
    turns: list[Turn] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the conversation's start, KV blocks held)"""
    batch: list[int] = field(default_factory=list)
    """Requests that ran at each sample while the documents were served."""
    documents_seconds: float = 0.0
    """From the first document's arrival to the last one's answer."""

    @property
    def replies(self) -> list[Reply]:
        return [reply for turn in self.turns for reply in turn.replies]

    @property
    def peak(self) -> int:
        return max(held for _, held in self.samples)

    @property
    def at_once(self) -> int:
        """The most documents that ran at once."""
        return max(self.batch)

    @property
    def mean_at_once(self) -> float:
        return sum(self.batch) / len(self.batch)

    @property
    def mean_held(self) -> float:
        """While requests ran."""
        busy = [held for _, held in self.samples if held]
        return sum(busy) / len(busy)

    @property
    def read_per_step(self) -> float:
        return sum(turn.read for turn in self.turns) / sum(turn.queries for turn in self.turns)

    @property
    def right(self) -> int:
        return sum(reply.right for reply in self.replies)


class Clients:
    """The conversation's clients at one server."""

    def __init__(
        self, engine: Engine, http: httpx.AsyncClient, conversation: Conversation
    ) -> None:
        self.engine = engine
        self.http = http
        self.conversation = conversation

    async def state(self) -> EngineState:
        answer = await self.http.get("/metrics")
        answer.raise_for_status()
        return self.engine.state(answer.text)

    async def warm_up(self) -> None:
        """The first request of a server pays for what is built at first use."""
        async for _ in self._stream("The capital of France is", 4):
            pass

    async def ask(self, question: Question) -> Reply:
        sent = time.monotonic()
        arrived: list[float] = []
        text, usage = "", {}
        async for event in self._stream(self.conversation.prompt(question), OUTPUT_TOKENS):
            if event["choices"]:
                arrived.append(time.monotonic())
                text += event["choices"][0]["text"]
            else:
                usage = event["usage"]
        output = usage["completion_tokens"]
        return Reply(
            question=question,
            text=text,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0,
            output_tokens=output,
            first_token_seconds=arrived[0] - sent,
            token_seconds=(arrived[-1] - arrived[0]) / (output - 1),
        )

    async def read(self, document: str) -> None:
        async for _ in self._stream(document, self.conversation.sizes.document_tokens):
            pass

    async def _stream(self, prompt: str, tokens: int) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events of a greedy completion of exactly ``tokens`` tokens."""
        request = {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self.http.stream("POST", "/v1/completions", json=request) as answer:
            if answer.is_error:
                await answer.aread()
                raise httpx.HTTPError(f"{answer.status_code}: {answer.text[:300]}")
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise httpx.HTTPError(str(event["error"]))
                    yield event


async def hold(
    engine: Engine,
    url: str,
    conversation: Conversation,
    documents: Sequence[str],
    row: Row,
    sampled: Callable[[int], object],
    turned: Callable[[], object],
) -> None:
    """Hold the conversation at a server, then bring all documents, and fill ``row``.

    Raises httpx.HTTPError, and ValueError if the server runs another policy.
    ``sampled(held)`` is called at every sample of the blocks held, ``turned()`` after a turn
    and after the documents.
    """
    timeout = httpx.Timeout(PATIENCE, connect=10)
    async with httpx.AsyncClient(base_url=url, timeout=timeout) as http:
        clients = Clients(engine, http, conversation)
        await clients.warm_up()
        state = await clients.state()
        if state.policy != str(parse(row.policy)):
            raise ValueError(
                f"the server was to run {row.policy}, but kvplug's counters in its /metrics say "
                f"{state.policy or 'nothing'}"
            )
        row.pool, row.fits = state.pool, state.fits
        began = time.monotonic()

        async def sample() -> None:
            while True:
                state = await clients.state()
                row.samples.append((time.monotonic() - began, state.held))
                sampled(state.held)
                await asyncio.sleep(SAMPLE_SECONDS)

        async def count() -> None:
            while True:
                await asyncio.sleep(SAMPLE_SECONDS)
                row.batch.append((await clients.state()).running)

        sampler = asyncio.create_task(sample())
        try:
            for turn in range(TURNS):
                before, started = await clients.state(), time.monotonic()
                asked = conversation.turn(turn)
                replies = await asyncio.gather(*map(clients.ask, asked))
                ended, after = time.monotonic(), await clients.state()
                row.turns.append(
                    Turn(
                        started=started - began,
                        seconds=ended - started,
                        replies=list(replies),
                        queries=after.queries - before.queries,
                        cached=after.cached - before.cached,
                        read=after.read - before.read,
                    )
                )
                turned()
        finally:
            await _cancel(sampler)
        sampler = asyncio.create_task(count())
        try:
            started = time.monotonic()
            await asyncio.gather(*map(clients.read, documents))
            row.documents_seconds = time.monotonic() - started
        finally:
            await _cancel(sampler)
        turned()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
