"""DuoAttention: heads that retrieve keep more, the others their first and their newest tokens.

    streaming head  keeps the ``sink`` first and the ``recent`` newest tokens
    retrieval head  keeps what the wrapped policy's score says, and what the others leave

of each layer's H ``budget`` tokens, ``budget`` being the mean: with r retrieval heads

    (H budget - (H - r) (sink + recent)) / r

each. Which heads retrieve is read from a file that ``kvplug calibrate`` made: the ``retrieval``
share of the model's KV heads whose output changes most where they see the first tokens and the
newest alone. A layer whose heads are all of one kind keeps what the wrapped policy does.

Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming
Heads", ICLR 2025, https://arxiv.org/abs/2410.10819

Differs from the paper: retrieval heads are compressed too, by any score (the paper's keep all), so
that a request's memory is bounded, and known before its prompt is; heads are told apart by what
each loses on text, where the paper trains gates on passkeys; a prompt's queries see all, streaming
heads' too, and the answer stays whole in every head. Shares are fixed before any prompt: where a
retrieval head's is more than a prompt has, the streaming heads of its layer keep more of what is
newest.

SmolLM2, calibrated on other text, copies a passage of 1,024 tokens of which a quarter is kept with
a loss of 2.28 nats a token with ``snapkv`` (2.61 without duo, .39 dense), 1.62 with ``keydiff``
(1.99) and 1.84 with ``random`` (2.20), in four texts (tools/two_kinds.py, by transformers). Of
exact recall, by a model half of whose heads say nothing, a quarter kept finds in vLLM, of the
answers to 24 questions, .46 with ``snapkv`` (.38), .32 with ``keydiff`` (.20) and .33 with
``random`` (.20; dense all), each in 17 blocks; ``keydiff`` by itself finds no more than
``random``. What it loses of text that goes on was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kvplug.compress import HeadBudgets, PromptKV
from kvplug.heads import read_heads
from kvplug.policy import Evidence, Positions


@dataclass(frozen=True, kw_only=True)
class Duo(HeadBudgets):
    name = "duo"
    evidence = Evidence.WINDOW_QUERIES
    query_agnostic = False
    paper = "https://arxiv.org/abs/2410.10819"
    example = "duo(snapkv(budget=1024), heads='heads.json')"

    heads: str
    """File of ``kvplug calibrate``, where the engine runs."""
    retrieval: float = 0.5
    """Share of the model's KV heads that retrieve."""
    sink: int = 128
    """First tokens that a streaming head keeps."""
    recent: int = 256
    """Newest tokens of a prompt that it keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.heads, str) and self.heads):
            raise ValueError(
                "duo: heads must name a file that kvplug calibrate made, got "
                f"{self.heads!r}; write duo({self.base}, heads='heads.json')"
            )
        if isinstance(self.retrieval, bool) or not (
            isinstance(self.retrieval, (int, float)) and 0 < self.retrieval < 1
        ):
            raise ValueError(
                "duo: retrieval must be a share of the model's KV heads, above 0 and below 1, got "
                f"{self.retrieval!r}; write duo({self.base}, heads='heads.json', retrieval=0.5)"
            )
        for field, least in (("sink", 0), ("recent", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"duo: {field} must be a number of tokens, at least {least}, got {value!r}; "
                    f"write duo({self.base}, heads='heads.json', {field}={getattr(Duo, field)})"
                )
        if self.sink + self.recent >= self.budget:
            raise ValueError(
                f"duo: a streaming head keeps sink + recent = {self.sink + self.recent:,} tokens, "
                f"which must be fewer than the mean, {self.base.name}'s budget of "
                f"{self.budget:,}, so that some are left for retrieval heads; write fewer, or a "
                "larger budget"
            )

    @property
    def files(self) -> tuple[str, ...]:
        return (self.heads,)

    def kinds(self, layer: int) -> tuple[bool, ...] | None:
        return _retrieving(self.heads, self.retrieval).get(layer)

    def head_pages(
        self, kinds: tuple[bool, ...], private: Positions, whole: Positions, page_size: int
    ) -> Positions:
        retrieving, H = sum(kinds), len(kinds)
        streaming = H - retrieving
        least = np.minimum(-(-(self.sink + self.recent) // page_size), private)
        most = np.minimum((H * private - streaming * least) // retrieving, whole)
        rest = np.minimum((H * private - retrieving * most) // streaming, whole)
        return np.where(np.array(kinds), most[:, None], rest[:, None])

    def score(self, prompt: PromptKV) -> Tensor:
        score = self.base.score(prompt)
        _, H, T = score.shape
        layer, first = divmod(prompt.first_head, H)
        assert not first, "a rank has all heads of a layer"
        kinds = self.kinds(layer)
        if kinds is None:
            return score
        position = torch.arange(T, device=score.device)
        newest = (position + T * (position < self.sink)).float().expand_as(score[:, 0])
        return torch.stack([score[:, h] if kinds[h] else newest for h in range(H)], 1)


@lru_cache(maxsize=16)
def _retrieving(file: str, share: float) -> dict[int, tuple[bool, ...]]:
    """Which KV heads retrieve, of layers that have some and others. Where as much is lost, the
    first ones do. Raises ValueError as ``read_heads``."""
    heads = read_heads(file)
    each = [(-lost, n, h) for n, one in heads.layers.items() for h, lost in enumerate(one.lost)]
    chosen = {(n, h) for _, n, h in sorted(each)[: round(share * len(each))]}
    kinds = {n: tuple((n, h) in chosen for h in range(heads.shape.kv_heads)) for n in heads.layers}
    return {n: one for n, one in kinds.items() if len(set(one)) > 1}
