"""StreamingLLM: keep the first tokens and the most recent ones.

    query i sees token j  iff  j < sinks  or  i - window < j <= i

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
https://arxiv.org/abs/2309.17453

Differs from the paper: visibility is rounded out to whole pages (up to S - 1 tokens more at
either edge), so that it is exactly what the cache holds; keys keep the positions they were
rotated with, so nothing is gained beyond the model's trained length.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.compress import PositionalEviction
from kvplug.policy import Positions


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(PositionalEviction):
    name = "streaming_llm"
    memory = "sinks + window"
    reads = "sinks + window"
    paper = "https://arxiv.org/abs/2309.17453"

    sinks: int = 4
    """First tokens of a request that are always kept."""
    window: int = 1020
    """Most recent tokens that are kept, the current one included."""

    def __post_init__(self) -> None:
        for field, least in (("sinks", 0), ("window", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"streaming_llm: {field} must be a number of tokens, at least {least}, "
                    f"got {value!r}; write streaming_llm(sinks=4, window=1020)"
                )

    def kept_from_start(self) -> int:
        return self.sinks

    def first_token(self, positions: Positions) -> Positions:
        return (positions - self.window + 1).clip(min=0)

    def most_tokens(self) -> int:
        return self.sinks + self.window
