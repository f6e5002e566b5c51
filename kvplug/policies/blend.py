"""Blend: chunks of a prompt as they were read alone, all but their first tokens.

    key of token i of a chunk that begins at s  =  R(s) k_i,     value  =  v_i      for i >= links

where k_i and v_i are what the chunk left in the cache as a prompt of its own, and R(s) rotates by
s tokens. The first ``links`` tokens of each chunk, and all that is in no chunk, are computed anew
and see everything before them.

A chunk that is read alone takes its own first tokens for the text's, and pours attention into
them: once those are computed in their place, most of the loss is gone. On SmolLM2-135M and four
chunks of 500 tokens, through vLLM, text that goes on behind them costs .035 nats a token more than
dense (2.151), and a quote from one of them .092 (.363; -.011 to .213 by resampling its four
texts); 212 of 2,036 tokens are computed, the first comes after .12 of dense's time, and exact
recall answers 48 of 48 look-ups (``tools/reused_chunks.py --texts 4 --timed 2``).

Hu et al., "EPIC: Efficient Position-Independent Caching for Serving Large Language Models", ICML
2025, https://arxiv.org/abs/2410.15332 (LegoLink); after Yao et al., "CacheBlend: Fast Large
Language Model Serving for RAG with Cached Knowledge Fusion", EuroSys 2025,
https://arxiv.org/abs/2405.16444, which chooses the tokens by their values, layer by layer.

Differs from the paper: whole pages are taken, so that ``links`` is rounded up to pages and a
chunk's tokens behind its last whole page are computed too; a chunk with which a prompt begins has
no link tokens, being its prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.policy import Evidence
from kvplug.reuse import ChunkReuse


@dataclass(frozen=True, kw_only=True)
class Blend(ChunkReuse):
    name = "blend"
    evidence = Evidence.NONE
    paper = "https://arxiv.org/abs/2410.15332"

    links: int = 8
    """Tokens at each chunk's start that are computed anew, at least."""

    def __post_init__(self) -> None:
        if isinstance(self.links, bool) or not isinstance(self.links, int) or self.links < 0:
            raise ValueError(
                f"blend: links must be a number of tokens, at least 0, got {self.links!r}; write "
                "blend(links=8)"
            )

    def computed_from_start(self) -> int:
        return self.links
