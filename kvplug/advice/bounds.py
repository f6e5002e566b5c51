"""Least times, by bytes and by arithmetic: what no kernel can be faster than.

For n requests at once of p prompt tokens and a answer tokens, halfway through their answers,

    step   = (weights read by n tokens + n * cache read) / bandwidth
    prompt = max(bytes / bandwidth, multiplications / arithmetic)
    tokens a second = a / (prompt + a * step / n)        once prompts queue up behind each other

*cache read* of a planned layer is ``StepReads.bytes``: the tokens that the policy reads there and
its share of the digests, or of the codes that say its keys; of a windowed layer its window; of a
recurrent one its state, read and written. A prompt's bytes are, for each of its chunks, the
weights, the cache of the chunks before it and its own (twice more in plain numbers where it is
decoded first), and what a packing reads of it at its end; its multiplications 2 for each weight
and token and 4 Hq D for each token that a query reads. What an engine spends besides (choosing,
launching, scheduling, sampling) comes on top: what gains a few per cent here gains nothing. On a
machine whose steps were measured (``Setup.pace``) a step takes what ``Pace.step`` says instead.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvplug.accounting import digest_bytes, step_reads
from kvplug.advice.capacity import Capacity, as_planned, capacity, coded
from kvplug.advice.card import Card
from kvplug.advice.model import Layer, Model
from kvplug.advice.pace import Pace, StepBytes, reader
from kvplug.offer import Offer
from kvplug.plan import Planner


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What comes: so many requests at once of a prompt and an answer."""

    prompt: int
    answer: int
    at_once: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer

    def __str__(self) -> str:
        return f"{self.prompt}/{self.answer}@{self.at_once}"


def read_traffic(text: str) -> Traffic:
    """32000/500@16 -> Traffic. Raises ValueError."""
    try:
        lengths, _, at_once = text.partition("@")
        prompt, _, answer = lengths.partition("/")
        found = Traffic(prompt=int(prompt), answer=int(answer), at_once=int(at_once))
    except ValueError:
        found = None
    if found is None or min(found.prompt, found.answer, found.at_once) < 1:
        raise ValueError(
            f"--traffic is prompt tokens / answer tokens @ requests at once, got {text!r}; write "
            "32000/500@16"
        )
    if found.tokens > 1 << 24:
        raise ValueError(f"--traffic: {found.tokens:,} tokens are more than 2 ** 24; write less")
    return found


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A machine and how its engine is started."""

    card: Card
    pool: float
    """Bytes that the cache has on each card."""
    block_size: int = 32
    chunk: int = 8192
    """Prompt tokens that a step computes at most."""
    steps: int = 2
    """That are in flight at once."""
    pace: Pace | None = None
    """Of its decode steps, where they were measured."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of one line. Seconds, bytes, requests."""

    capacity: Capacity
    at_once: int
    """Requests that decode together: what is asked for, or what fits."""
    read: float
    """Cache bytes that a request's decode step reads."""
    step: float
    """Seconds of a decode step: at least, or as measured ones took."""
    first: float
    """Seconds to a request's first token, alone."""
    rate: float
    """Answer tokens a second, of all requests."""


def bounds(
    model: Model, setup: Setup, traffic: Traffic, offer: Offer, itemsize: int | None = None
) -> Bounds:
    """offer: of the server. itemsize: bytes of a number in the cache. Raises ValueError for an
    offer whose reads the setup's pace does not know."""
    held = capacity(
        model, offer, setup.pool, block_size=setup.block_size, prompt=traffic.prompt,
        tokens=traffic.tokens, in_flight=setup.chunk * setup.steps, itemsize=itemsize,
    )  # fmt: skip
    reads = Reads(model, setup, traffic, offer, itemsize or model.itemsize)
    together = min(traffic.at_once, held.together)
    n = max(1, together)
    read = reads.decode()
    if setup.pace is None:
        step = (model.read_weights(n) + n * read.bytes) / setup.card.bandwidth
    else:
        step = setup.pace.step(reader(offer.settings.policy), n, read)
    first = reads.prompt()
    rate = traffic.answer / (first + traffic.answer * step / n) if together else 0.0
    return Bounds(
        capacity=held, at_once=together, read=read.bytes, step=step, first=first, rate=rate
    )


@dataclass(frozen=True)
class Reads:
    """What a request's steps read under an offer's own policy."""

    model: Model
    setup: Setup
    traffic: Traffic
    offer: Offer
    itemsize: int

    def decode(self) -> StepBytes:
        """What a decode step reads of the cache, halfway through the answer."""
        seen = self.traffic.prompt + max(1, self.traffic.answer // 2)
        read, _ = self._layers(np.array([seen - 1]), np.array([seen]))
        return read + StepBytes(whole=2 * self._states)

    def prompt(self) -> float:
        """Seconds of a prompt's steps at least."""
        card, (moved, multiplied) = self.setup.card, self.prompt_work()
        by_bytes = moved / card.bandwidth
        return max(by_bytes, multiplied / card.arithmetic) if card.arithmetic else by_bytes

    def prompt_work(self) -> tuple[float, float]:
        """Bytes that a prompt's steps move, and their multiplications."""
        chunk, moved, multiplied = self.setup.chunk, 0.0, 0.0
        each = 2 / self.model.weight_size * self.model.token_weights
        for begin in range(0, self.traffic.prompt, chunk):
            end = min(begin + chunk, self.traffic.prompt)
            held, pairs = self._layers(np.array([begin]), np.array([end]))
            moved += self.model.read_weights(end - begin) + held.bytes + 2 * self._states
            multiplied += each * (end - begin) + pairs
        if self.offer.settings.policy.scored is not None:
            tokens = sum(self._token(layer) for layer in self.model.planned)
            moved += tokens * self.traffic.prompt
        return moved, multiplied

    @property
    def _states(self) -> int:
        return sum(layer.state for layer in self.model.layers)

    def _layers(self, computed: np.ndarray, total: np.ndarray) -> tuple[StepBytes, float]:
        """What a step reads of the cache, and its multiplications in attention."""
        held, multiplied = StepBytes(), 0.0
        for (layer, window, budget), count in self._kinds.items():
            token = self._token(layer)
            work = 4 * self.model.heads * layer.head_dim
            if window is not None:
                positions = np.arange(computed[0], total[0])
                seen = np.minimum(positions + 1, window)
                seen_by_any = min(int(total[0]), window + len(positions) - 1)
                held += StepBytes(whole=count * token * seen_by_any)
                multiplied += count * work * float(seen.sum())
                continue
            planner = Planner(self.offer.settings, self.setup.block_size, budget)
            prompt = np.array([self.traffic.prompt])
            segments = planner.plan(computed, total, prompt)
            chosen = planner.layer_budget(layer.number)
            reads = step_reads(segments, planner, [chosen])
            if total[0] > self.traffic.prompt:
                read = count * token * reads.read
                if chosen is not None and segments.selects.any():
                    scanned = count * self._digest(layer) * reads.scanned
                    held += StepBytes(chosen=read, scanned=scanned, choosing=count)
                else:
                    held += StepBytes(whole=read)
                multiplied += count * work * reads.read
            else:  # a chunk reads what any of its queries sees once
                prefill = reads.prefill
                assert prefill is not None
                seen = float(segments.visible.max(initial=0))
                beside = self._digest(layer)
                if self.offer.format is not None:  # decoded first: written, and read again
                    beside = 2 * self.model.token_bytes(layer, self.itemsize)
                held += StepBytes(whole=count * (token + beside) * seen)
                multiplied += count * work * prefill.read
        return held, multiplied

    @cached_property
    def _kinds(self) -> Counter[tuple[Layer, int | None, int | None]]:
        """Layers that read alike, and how many they are: by shape, window and budget."""
        policy = self.offer.settings.policy
        selector = policy.selector
        found: Counter[tuple[Layer, int | None, int | None]] = Counter()
        first: dict[object, int] = {}
        for layer, window, budget in as_planned(self.model, policy):
            chosen = selector.layer_budget(layer.number) if selector else None
            alike = (layer.kv_heads, layer.head_dim, window, budget, chosen)
            number = first.setdefault(alike, layer.number)
            one = Layer(number=number, kv_heads=layer.kv_heads, head_dim=layer.head_dim)
            found[one, window, budget] += 1
        return found

    def _token(self, layer: Layer) -> float:
        """Bytes of a token in a layer."""
        if layout := coded(layer, self.offer, self.setup.block_size, self.itemsize):
            return layer.kv_heads * layout.page_bytes / layout.page_size
        return self.model.token_bytes(layer, self.itemsize)

    def _digest(self, layer: Layer) -> float:
        """Bytes of what says a page's keys, for each of its tokens."""
        size = self.setup.block_size
        if layout := coded(layer, self.offer, size, self.itemsize):
            return layer.kv_heads * layout.key_bytes / size
        pages, rows = self.offer.digest_rows(size, self.itemsize)
        whole = digest_bytes(pages * rows, layer.kv_heads, layer.head_dim, self.itemsize)
        return whole / size


def pool_bytes(model: Model, card: Card, share: float = 0.92, overhead: float = 2 << 30) -> float:
    """What a card has left for the cache: ``share`` of its memory, as vLLM's
    ``--gpu-memory-utilization``, less the weights and ``overhead`` for everything else. Raises
    ValueError where nothing is left."""
    left = share * card.memory - model.weights - overhead
    if left <= 0:
        needed = math.ceil((model.weights + overhead) / (share * card.memory))
        raise ValueError(
            f"{model.name} has {model.weights / 2**30:.1f} GiB of weights, and {card.name} "
            f"{card.memory / 2**30:.1f} GiB; write --ranks {max(2, needed)} for tensor "
            "parallelism, or a larger card"
        )
    return left
