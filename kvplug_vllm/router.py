"""Which row of the batch is which request: where each original prompt ends.

vLLM shows every worker's logits processors all requests, with their row, before it builds the
attention metadata. This one never touches a logit. It derives from both interfaces, because
Model Runner V2 refuses a processor that knows V1 alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from kvplug_vllm import NAME, compat

UNKNOWN = -1


class Router(*compat.logits_processors()):  # type: ignore[misc]
    """Prompt length by row (V1) or slot (V2). Does nothing unless kvplug was selected."""

    _of_engine: ClassVar[dict[int, Router]] = {}

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        backend = vllm_config.attention_config.backend
        self.active = backend is not None and backend.name == NAME
        self.vllm_config = vllm_config
        rows = vllm_config.scheduler_config.max_num_seqs
        self.prompt = np.full(rows, UNKNOWN, np.int64)
        self.stay = np.full(rows, UNKNOWN, np.int64)
        """A number for each request, the same when it leaves the batch for a few steps."""
        self.stays = 0
        self._known: dict[int, tuple[Any, int]] = {}
        # V2 hands over its request states, V1 a device and whether memory is pinned.
        self.slots = rest[0] if len(rest) == 1 else None
        if self.active:
            self._of_engine.clear()  # a process serves one engine at a time
            self._of_engine[id(vllm_config)] = self

    @classmethod
    def prompts(cls, vllm_config: Any, common: Any) -> NDArray[np.int64]:
        """Original prompt length of each row, also after a preemption; UNKNOWN for rows of no
        request (warm-up, graph capture, padding). common: CommonAttentionMetadata -> [B]
        """
        router = cls._of_engine.get(id(vllm_config))
        if router is not None and router.slots is not None:
            return _at(router.slots.prompt_len.np, common)
        return _at(None if router is None else router.prompt, common)

    @classmethod
    def stays_of(cls, vllm_config: Any, common: Any) -> NDArray[np.int64]:
        """What tells requests apart while they stay in the batch. common -> [B]"""
        router = cls._of_engine.get(id(vllm_config))
        return _at(None if router is None else router.stay, common)

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that left, came and moved since the last step."""
        if batch_update is None or not self.active:
            return
        for row in batch_update.removed:
            self.prompt[row] = self.stay[row] = UNKNOWN
        for row, _params, prompt, output in batch_update.added:
            self.prompt[row] = UNKNOWN if prompt is None else len(prompt)
            self.stay[row] = self._stay(output)
        for source, target, direction in batch_update.moved:
            swap = direction == MoveDirectionality.SWAP
            for table in (self.prompt, self.stay):
                moved, displaced = table[source], table[target]
                table[target], table[source] = moved, displaced if swap else UNKNOWN

    def _stay(self, output: list[int]) -> int:
        """V1 names no request, but hands over the list that it appends the answer to."""
        known = self._known.pop(id(output), None)
        if known is None:
            known = output, self.stays
            self.stays += 1
        self._known[id(output)] = known  # holding the list, its id stays its own
        if len(self._known) > 4 * len(self.stay):
            del self._known[next(iter(self._known))]
        return known[1]

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: nothing of a request's logits is ours."""
        self.stay[req_idx], self.stays = self.stays, self.stays + 1
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any, context: Any = None) -> Any:
        return logits


def _at(table: NDArray[np.int64] | None, common: Any) -> NDArray[np.int64]:
    """The table's entry for each row of the batch; UNKNOWN beyond it. -> [B]"""
    if table is None:
        return np.full(common.num_reqs, UNKNOWN, np.int64)
    rows = compat.request_rows(common)
    return np.where(rows < len(table), table[np.minimum(rows, len(table) - 1)], UNKNOWN)
