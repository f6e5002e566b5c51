"""A client of a served engine: completions as they stream in, and what the server counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self

import httpx

from kvplug_evals.served.engine import NAME, Engine, EngineState

PATIENCE = 1800
"""Seconds for an answer: the last of many waits for all before it, minutes each on a CPU that has
no instructions for bfloat16."""
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_seconds: float
    token_seconds: float
    """Per output token after the first."""


class Client:
    """Of one server, for as long as ``http`` is open."""

    def __init__(self, engine: Engine, http: httpx.AsyncClient) -> None:
        self.engine = engine
        self.http = http

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, engine: Engine, url: str) -> AsyncIterator[Self]:
        timeout = httpx.Timeout(PATIENCE, connect=10)
        async with httpx.AsyncClient(base_url=url, timeout=timeout) as http:
            yield cls(engine, http)

    async def state(self) -> EngineState:
        answer = await self.http.get("/metrics")
        answer.raise_for_status()
        return self.engine.state(answer.text)

    async def complete(self, prompt: str, tokens: int) -> Completion:
        """A greedy completion of exactly ``tokens`` tokens. Raises httpx.HTTPError."""
        sent = time.monotonic()
        arrived: list[float] = []
        text, usage = "", {}
        async for event in self._stream(prompt, tokens):
            if event["choices"]:
                arrived.append(time.monotonic())
                text += event["choices"][0]["text"]
            else:
                usage = event["usage"]
        output = usage["completion_tokens"]
        return Completion(
            text=text,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0,
            output_tokens=output,
            first_token_seconds=arrived[0] - sent,
            token_seconds=(arrived[-1] - arrived[0]) / max(output - 1, 1),
        )

    async def _stream(self, prompt: str, tokens: int) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events."""
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

    @contextlib.asynccontextmanager
    async def sampling(self, take: Callable[[EngineState], object]) -> AsyncIterator[None]:
        """``take`` is called with the server's state every ``SAMPLE_SECONDS`` meanwhile."""

        async def sample() -> None:
            while True:
                take(await self.state())
                await asyncio.sleep(SAMPLE_SECONDS)

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
