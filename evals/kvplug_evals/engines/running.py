"""What one request of a wave has done so far, in whichever engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvplug_evals.engines.interface import EngineError, Reply, Request

SETTLED = 3
"""Output tokens after which a prompt's compression has freed what it frees."""
STAY = 64
"""Tokens that a request may decode beyond its answer while others are still submitted."""
COUNTERS = [f"kvplug_{name}_total" for name in ("decode_queries", "cached_tokens", "read_tokens")]


def check_lengths(requests: Sequence[Request], served: int) -> None:
    """Raises EngineError for a request that an engine would cut short at so many tokens."""
    for request in requests:
        wanted = len(request.prompt) + len(request.forced) + request.new_tokens
        if wanted > served:
            raise EngineError(
                f"{request.key} needs {wanted:,} tokens and the engine serves {served:,}; give "
                "max_model_len, or the suite's room, more"
            )


def end_tokens(model: str) -> frozenset[int]:
    """With which the model ends an answer. Engines are told to ignore them: among forced tokens
    they end nothing, and a request stays until all are seen together.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        given = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        given = AutoConfig.from_pretrained(model).eos_token_id
    return frozenset(given if isinstance(given, list) else [given]) - {None}


class Running:
    def __init__(self, request: Request, started: float, ends: frozenset[int]) -> None:
        self.request = request
        self.ends = ends
        self.started = started
        self.first = self.last = 0.0
        """When its first and its last token so far came."""
        self.cached = 0
        self.steps = 0
        """Tokens that the engine decoded of it."""
        self.done = False
        """Its answer is whole."""
        self.dismissed = False
        """The engine was told to end it."""
        self.gone = False
        """The engine holds nothing of it any more."""
        self.tokens: list[int] = []
        """Of forced and free parts, none beyond the answer."""
        self.scores: list[Any] = []
        """For each token that was asked for: (log p, whether it is the model's first choice)."""

    @property
    def free(self) -> list[int]:
        return self.tokens[len(self.request.forced) :]

    def add(self, tokens: Iterable[int], now: float, tokenizer: Any) -> None:
        """What the engine decoded. Tokens beyond the answer are counted as steps alone."""
        for token in tokens:
            self.steps += 1
            if not self.done:
                self.tokens.append(token)
                self.first, self.last = self.first or now, now
                self.done = self._complete(tokenizer)

    def _complete(self, tokenizer: Any) -> bool:
        request, free = self.request, self.free
        if free and free[-1] in self.ends:
            return True
        if len(free) >= request.new_tokens and len(self.tokens) >= len(request.forced):
            return True
        if not request.until or not free:
            return False
        text = tokenizer.decode(free)
        return any(stop in text for stop in request.until)

    def reply(self, tokenizer: Any) -> Reply:
        request = self.request
        text = tokenizer.decode(self.free, skip_special_tokens=True)
        for stop in request.until:
            text = text.partition(stop)[0]
        scored = self.scores[len(request.forced) - request.scored : len(request.forced)]
        steps = len(self.tokens) - 1
        return Reply(
            key=request.key,
            text=text,
            tokens=self.free,
            prompt_tokens=len(request.prompt),
            cached_tokens=self.cached,
            first_token_seconds=self.first - self.started,
            token_seconds=(self.last - self.first) / steps if steps else 0.0,
            losses=[-logprob for logprob, _ in scored],
            agreed=[agreed for _, agreed in scored],
        )
