"""What fills the stage reuse: rows of chunks that other prompts left, wherever those stood.

A prompt names chunks that may have been seen before. What the cache has of each, as the chunk was
read alone, serves again but for its first few tokens: keys rotated by where the chunk now begins
(``kvplug.rotation``). An engine knows but one number of a request, how many of its first tokens
are cached, so such a prompt lies in the cache in another order than it is read:

    physical   [whole pages of every chunk | all other tokens, in order]
    logical    chunk 1, tokens between, chunk 2, ..., what follows them

The model is told logical positions. What a query sees are the pages of those chunks that come
before it, and the other tokens up to itself: the first pages of its request, then all from where
the others begin. The last token of a prompt is never cached, and whatever is decoded comes last in
both orders.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from kvplug.policy import Action, Granularity, Policy, Positions, Sharing, Stage


@dataclass(frozen=True, kw_only=True)
class ChunkReuse(Policy):
    """Takes chunks of a prompt as they were read alone."""

    stage = Stage.REUSE
    action = Action.PLACEMENT
    granularity = Granularity.PAGE
    query_agnostic = True
    memory = "all tokens"
    reads = "all tokens"

    @property
    def alone(self) -> str:
        return (
            "takes chunks as requests of their own left them, whole and plain, and was never run "
            "beside another policy"
        )

    @property
    def publishes(self) -> Sharing:
        return Sharing.OWN

    @abstractmethod
    def computed_from_start(self) -> int:
        """Tokens at the start of each chunk that every prompt computes anew, but for a chunk with
        which it begins: that is its prefix."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Pages of a chunk that a prompt takes from the cache."""

    chunk: int
    """Its number among those that the prompt names."""
    start: int
    """Where it begins in the prompt: how far its keys are rotated."""
    pages: range
    """Counted from the chunk's own start."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """A prompt of which pages are taken from elsewhere: where its tokens lie, what they see."""

    placed: tuple[Placed, ...]
    """In the order of the prompt."""
    prompt: int
    """Tokens."""
    page_size: int

    @cached_property
    def cached(self) -> int:
        """Pages that are taken, all of which lie first."""
        return sum(len(each.pages) for each in self.placed)

    @cached_property
    def sources(self) -> tuple[Positions, Positions, Positions]:
        """Of each page that is taken: the number of its chunk, that of the page in it, and how far
        its keys are rotated. [cached] each"""
        each = [(one.chunk, page, one.start) for one in self.placed for page in one.pages]
        chunk, page, shift = np.array(each, np.int64).reshape(-1, 3).T
        return chunk, page, shift

    def own(self, line: str, salt: str | None, contents: Sequence[str]) -> bytes:
        """What tells the pages of a request that lies so from all others'. line: the policy's.
        salt: the user's. contents: of each chunk, what tells it from any other."""
        taken = [
            [one.start, one.pages.start, one.pages.stop, contents[one.chunk]]
            for one in self.placed
        ]
        return hashlib.sha256(json.dumps([line, salt, taken]).encode()).digest()

    @cached_property
    def order(self) -> Positions:
        """Where each token that lies in the cache stands in the prompt. [prompt] int64"""
        size, own = self.page_size, np.arange(self.prompt)
        taken = [
            own[each.start + each.pages.start * size : each.start + each.pages.stop * size]
            for each in self.placed
        ]
        first = np.concatenate([own[:0], *taken])
        return np.concatenate([first, np.delete(own, first)])

    @cached_property
    def _before(self) -> Positions:
        """Taken pages that come before each token of the order."""
        taken = self.order[: self.cached * self.page_size]
        return np.searchsorted(taken, self.order) // self.page_size

    def logical(self, positions: Positions) -> Positions:
        """Where tokens stand in the request, its answer included. [n] -> [n]"""
        inside = np.minimum(positions, self.prompt - 1)
        return np.where(positions < self.prompt, self.order[inside], positions)

    def seen(self, positions: Positions) -> tuple[Positions, Positions]:
        """Of tokens that lie behind the taken pages: how many of those each sees, its request's
        first, and the page from which on it sees all up to itself; 0 and 0 for who sees
        everything. [n] -> [n] twice"""
        assert (positions >= self.cached * self.page_size).all(), "what is taken is not computed"
        kept = self._before[np.minimum(positions, self.prompt - 1)]
        hidden = (positions < self.prompt) & (kept < self.cached)
        return np.where(hidden, kept, 0), np.where(hidden, self.cached, 0)


@lru_cache(maxsize=256)
def arrange(
    policy: ChunkReuse, chunks: tuple[tuple[int, int], ...], prompt: int, page_size: int
) -> Arrangement:
    """A prompt of so many tokens whose chunks are all there. chunks: ascending spans of it."""
    anew, placed = -(-policy.computed_from_start() // page_size), []
    for number, (first, last) in enumerate(chunks):
        begin, end = anew if first else 0, (last - first) // page_size
        if first + end * page_size >= prompt:  # its last token is asked for what comes next
            end -= 1
        if begin < end:
            placed.append(Placed(chunk=number, start=first, pages=range(begin, end)))
    return Arrangement(placed=tuple(placed), prompt=prompt, page_size=page_size)


def rearranged(tokens: Sequence[int], arrangement: Arrangement) -> list[int]:
    """A prompt's tokens as they lie in the cache."""
    return [tokens[place] for place in arrangement.order.tolist()]
