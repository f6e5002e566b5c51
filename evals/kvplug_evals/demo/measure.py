"""What clients feel and what the engine says of itself, while a conversation runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from kvplug import parse
from kvplug_evals.demo.conversation import TURNS, Conversation, Question
from kvplug_evals.served.client import Client, Completion
from kvplug_evals.served.engine import Engine, EngineState

OUTPUT_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Reply(Completion):
    question: Question

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


class Clients(Client):
    """The conversation's, at one server."""

    async def warm_up(self) -> None:
        """The first request of a server pays for what is built at first use."""
        await self.complete("The capital of France is", 4)

    async def ask(self, conversation: Conversation, question: Question) -> Reply:
        answer = await self.complete(conversation.prompt(question), OUTPUT_TOKENS)
        return Reply(question=question, **asdict(answer))


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
    async with Clients.of(engine, url) as clients:
        await clients.warm_up()
        state = await clients.state()
        if state.policy != str(parse(row.policy)):
            raise ValueError(
                f"the server was to run {row.policy}, but kvplug's counters in its /metrics say "
                f"{state.policy or 'nothing'}"
            )
        row.pool, row.fits = state.pool, state.fits
        began = time.monotonic()

        def sample(state: EngineState) -> None:
            row.samples.append((time.monotonic() - began, state.held))
            sampled(state.held)

        async with clients.sampling(sample):
            for turn in range(TURNS):
                before, started = await clients.state(), time.monotonic()
                asked = conversation.turn(turn)
                replies = await asyncio.gather(
                    *(clients.ask(conversation, question) for question in asked)
                )
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
        async with clients.sampling(lambda state: row.batch.append(state.running)):
            started = time.monotonic()
            tokens = conversation.sizes.document_tokens
            await asyncio.gather(*(clients.complete(each, tokens) for each in documents))
            row.documents_seconds = time.monotonic() - started
        turned()
