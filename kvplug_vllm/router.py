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
        self.prompt = np.full(vllm_config.scheduler_config.max_num_seqs, UNKNOWN, np.int64)
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
        if router is None:
            return np.full(common.num_reqs, UNKNOWN, np.int64)
        rows = compat.request_rows(common)
        table = router.prompt if router.slots is None else router.slots.prompt_len.np
        return np.where(rows < len(table), table[np.minimum(rows, len(table) - 1)], UNKNOWN)

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that left, came and moved since the last step."""
        if batch_update is None or not self.active:
            return
        for row in batch_update.removed:
            self.prompt[row] = UNKNOWN
        for row, _params, prompt, _output in batch_update.added:
            self.prompt[row] = UNKNOWN if prompt is None else len(prompt)
        for source, target, direction in batch_update.moved:
            moved, displaced = self.prompt[source], self.prompt[target]
            self.prompt[target] = moved
            swap = direction == MoveDirectionality.SWAP
            self.prompt[source] = displaced if swap else UNKNOWN

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: nothing of a request's logits is ours."""
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any, context: Any = None) -> Any:
        return logits
