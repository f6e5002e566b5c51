"""CUR (CurDKV): keep the tokens whose keys and values are long among their neighbours'.

    s_j = ||k_j||^2 / sum_i ||k_i||^2  *  ||v_j||^2 / sum_i ||v_i||^2

over the block of ``local`` tokens in which j lies, the first beginning at the first token: squared
norms stand for the leverage of a row, by which a CUR decomposition takes rows.

Sengupta et al., "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition",
NeurIPS 2025, https://arxiv.org/abs/2509.15038

Differs from the paper: norms are those of the rows, as the authors' code has it by default, and
not of the rows projected at random to 20 numbers; their product is what remains of its four ways
to join them. Blocks are counted from the first token, as in kvpress; the authors' code counts them
from the last. The first ``sinks`` tokens always stay. In fp32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvplug.compress import PromptKV, ScoredEviction
from kvplug.policy import Evidence


@dataclass(frozen=True, kw_only=True)
class CUR(ScoredEviction):
    name = "cur"
    evidence = Evidence.KEYS_AND_VALUES
    query_agnostic = True
    paper = "https://arxiv.org/abs/2509.15038"

    local: int | None = 16
    """Tokens of a block whose norms are compared; None for all of the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.local, int) and not isinstance(self.local, bool)
        if self.local is not None and not (whole and self.local >= 2):
            raise ValueError(
                f"cur: local must be a number of tokens, at least 2, or None, got {self.local!r}; "
                "write cur(local=16)"
            )

    def score(self, prompt: PromptKV) -> Tensor:
        return self._leverage(prompt, prompt.keys) * self._leverage(prompt, prompt.values)

    def _leverage(self, prompt: PromptKV, rows: Tensor) -> Tensor:
        """Shares of a block's squared norms. [B, T, H, D] -> [B, H, T] fp32"""
        squared = torch.linalg.vector_norm(rows, dim=3, dtype=torch.float32).square()
        squared = squared.masked_fill(~prompt.valid[:, :, None], 0).transpose(1, 2)
        T = squared.shape[2]
        block = min(self.local or T, T)
        blocks = pad(squared, (0, -T % block)).unflatten(2, (-1, block))
        total = blocks.sum(3, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (blocks / total).flatten(2)[:, :, :T]
