"""A logits processor of vLLM: a request's first output tokens are those it names.

``extra_args={"kvplug_forced": [...]}``. With ``logprobs_mode="raw_logprobs"`` the engine still
returns what the model itself gave them, so the loss of a given answer measures decoding: the
tokens are read from the cache as a policy left it, one step at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

KEY = "kvplug_forced"


class ForcedTokens(LogitsProcessor):
    """For Model Runner V1. Row of the batch -> (tokens to force, the list of its output)."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[list[int], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        forced = (sampling_params.extra_args or {}).get(KEY, [])
        if not isinstance(forced, list) or not all(isinstance(t, int) for t in forced):
            raise ValueError(f"{KEY} must be a list of token ids, got {forced!r}")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _prompt, output in batch_update.added:
            self.rows.pop(row, None)
            forced = (params.extra_args or {}).get(KEY)
            if forced:
                self.rows[row] = forced, output
        for source, target, direction in batch_update.moved:
            moved, displaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (forced, output) in self.rows.items():
            if len(output) < len(forced):
                logits[row] = -torch.inf
                logits[row, forced[len(output)]] = 0.0
        return logits
