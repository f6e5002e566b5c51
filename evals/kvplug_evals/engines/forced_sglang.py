"""A custom logit processor of SGLang: a request's first output tokens are those it names.

``custom_params={"kvplug_forced": [...], "kvplug_scored": n}``. SGLang takes log-probabilities
behind the processor, where a forced token has 0, so the processor itself hands back what the
model gave the last ``n`` of them: ``meta_info["kvplug_scores"]``, aligned with the output.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

FORCED, SCORED, SCORES = "kvplug_forced", "kvplug_scored", "kvplug_scores"


class ForcedTokens(CustomLogitProcessor):
    def __call__(
        self, logits: Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> Tensor:
        """logits [B, V], changed in place"""
        asked = custom_param_list or []
        rows, places, tokens = [], [], []
        for row, each in enumerate(asked):
            place, forced = _place(each["__req__"]), each[FORCED]
            if 0 <= place < len(forced):
                rows.append(row)
                places.append(place)
                tokens.append(forced[place])
        if rows:
            wanted = torch.tensor(tokens, device=logits.device)
            self._score([asked[row] for row in rows], places, logits[rows], wanted)
            logits[rows] = -torch.inf
            logits[rows, wanted] = 0.0
        return logits

    @staticmethod
    def _score(
        asked: list[dict[str, Any]], places: list[int], logits: Tensor, wanted: Tensor
    ) -> None:
        """logits [n, V], wanted [n] -> (log p, whether it is the model's first choice) for each"""
        first = [len(each[FORCED]) - each[SCORED] for each in asked]
        told: list[Any] = [None] * len(asked)
        if any(place >= f for place, f in zip(places, first, strict=True)):
            logprobs = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            agreed = logits.argmax(-1) == wanted
            told = list(zip(logprobs.tolist(), agreed.tolist(), strict=True))
        for each, place, begin, score in zip(asked, places, first, told, strict=True):
            if each[SCORED]:
                _write(each["__req__"], place, score if place >= begin else None)


def _place(request: Any) -> int:
    """The output token that is being decided; negative while the prompt is not all computed.

    Counted by what the step computes: with overlap the token before is not in ``output_ids`` yet.
    """
    return int(request.kv.kv_committed_len) - len(request.origin_input_ids)


def _write(request: Any, place: int, score: tuple[float, bool] | None) -> None:
    """By place, since a retracted request decides its last token once more."""
    request.customized_info = request.customized_info or {}
    scores = request.customized_info.setdefault(SCORES, [])
    scores[place:] = [score]
