"""Which row of the batch is which request: where its prompt ends, which policy it asked for.

vLLM shows every worker's logits processors all requests, with their row, before it builds the
attention metadata. This one never touches a logit. It derives from both interfaces, because
Model Runner V2 refuses a processor that knows V1 alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from kvplug import Choices, Settings
from kvplug_vllm import compat
from kvplug_vllm.admission import Judging, not_selected
from kvplug_vllm.settings import (
    Taken,
    asked_for,
    compiled_for,
    offer_of,
    selected,
    taken_for,
)

UNKNOWN = -1
OWN = 0
"""The choice of a request that says nothing: the server's own settings."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A step's batch as its planner takes it, rows that only pad it included; [B] each."""

    settings: list[Settings]
    """By number."""
    choice: NDArray[np.int64]
    """The number of each row's; the server's own for rows of no request."""
    computed: NDArray[np.int64]
    """Cached tokens before the step."""
    total: NDArray[np.int64]
    """Cached tokens after the step."""
    prompt: NDArray[np.int64]
    """Tokens of the original prompt, also after a preemption; UNKNOWN for rows of no request."""
    stay: NDArray[np.int64]
    """What tells requests apart while they stay in the batch; UNKNOWN for rows of no request."""

    ends: NDArray[np.bool_]
    """Rows of requests for a single token: they are gone before their prompt could be packed."""

    @property
    def known(self) -> NDArray[np.bool_]:
        """Rows of requests: what warm-up, graph capture and padding bring has no prompt."""
        return (self.stay != UNKNOWN) & (self.prompt != 0)


class Router(*compat.logits_processors()):  # type: ignore[misc]
    """Prompt and choice by row (V1) or slot (V2). Does nothing unless kvplug was selected."""

    _of_engine: ClassVar[dict[int, Router]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Where no engine of the process was set to kvplug. Any other is asked by its own
        configuration, which vLLM does not say here (``admission``). Raises ValueError."""
        asked = asked_for(sampling_params)
        if asked is not None and not Judging.begun:
            raise ValueError(not_selected(asked))

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        self.active = selected(vllm_config)
        self.vllm_config = vllm_config
        rows = vllm_config.scheduler_config.max_num_seqs
        self.prompt = np.full(rows, UNKNOWN, np.int64)
        self.choice = np.full(rows, OWN, np.int64)
        self.stay = np.full(rows, UNKNOWN, np.int64)
        """A number for each request, the same when it leaves the batch for a few steps."""
        self.stays = 0
        self.answer = np.full(rows, UNKNOWN, np.int64)
        """The most tokens that a request may decode."""
        self.taken: list[Taken] = []
        """Of requests that came since the last step was planned."""
        self.ticket = 0
        """The highest whose blocks were taken."""
        self._known: dict[int, tuple[Any, int]] = {}
        # V2 hands over its request states, V1 a device and whether memory is pinned.
        self.slots = rest[0] if len(rest) == 1 else None
        if self.active:
            if self.slots is not None:
                compat.name_requests()
            self.offer = offer_of(vllm_config)
            self.choices = Choices(self.offer.settings)
            self._of_engine.clear()  # a process serves one engine at a time
            self._of_engine[id(vllm_config)] = self

    @classmethod
    def rows(cls, vllm_config: Any, common: Any) -> Rows:
        """common: CommonAttentionMetadata"""
        settings, choice = cls.chosen(vllm_config, common)
        bounds = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        total = compat.host_lengths(common)
        return Rows(
            settings=settings,
            choice=choice,
            computed=total - np.diff(bounds),
            total=total,
            prompt=cls.prompts(vllm_config, common),
            stay=cls.stays_of(vllm_config, common),
            ends=cls._ends(vllm_config, common),
        )

    @classmethod
    def check_named(cls, vllm_config: Any, common: Any) -> None:
        """Raises RuntimeError where the runner does not say whose a step's rows are."""
        router = cls._of_engine.get(id(vllm_config))
        if router is not None and router.slots is not None and common.req_idx is None:
            raise RuntimeError(
                "kvplug: Model Runner V2 does not say which request is which for this model; "
                "serve it with VLLM_USE_V2_MODEL_RUNNER=0, or with the policy 'dense'"
            )

    @classmethod
    def prompts(cls, vllm_config: Any, common: Any) -> NDArray[np.int64]:
        """Original prompt length of each row, also after a preemption; UNKNOWN for rows of no
        request (warm-up, graph capture, padding). common: CommonAttentionMetadata -> [B]
        """
        router = cls._of_engine.get(id(vllm_config))
        if router is not None and router.slots is not None:
            return router._at(router.slots.prompt_len.np, common)
        return _nobody(common) if router is None else router._at(router.prompt, common)

    @classmethod
    def chosen(cls, vllm_config: Any, common: Any) -> tuple[list[Settings], NDArray[np.int64]]:
        """Settings by number, and the number of each row; the server's own for rows of no
        request. common -> [B]
        """
        router = cls._of_engine.get(id(vllm_config))
        if router is None:
            return [offer_of(vllm_config).settings], np.zeros(common.num_reqs, np.int64)
        return router.choices.settings, np.maximum(router._at(router.choice, common), OWN)

    @classmethod
    def _ends(cls, vllm_config: Any, common: Any) -> NDArray[np.bool_]:
        router = cls._of_engine.get(id(vllm_config))
        return (_nobody(common) if router is None else router._at(router.answer, common)) == 1

    @classmethod
    def staying(cls, vllm_config: Any) -> set[int]:
        """Stays of requests that may be served again; all others have left."""
        router = cls._of_engine.get(id(vllm_config))
        if router is None:
            return set()
        return {*router.stay.tolist(), *(number for _, number in router._known.values())}

    @classmethod
    def stays_of(cls, vllm_config: Any, common: Any) -> NDArray[np.int64]:
        """What tells requests apart while they stay in the batch. common -> [B]"""
        router = cls._of_engine.get(id(vllm_config))
        return _nobody(common) if router is None else router._at(router.stay, common)

    def _at(self, table: NDArray[np.int64], common: Any) -> NDArray[np.int64]:
        """The table's entry for each row of the batch; UNKNOWN beyond it. -> [B]"""
        rows = compat.request_rows(common, slots=self.slots is not None)
        known = (rows >= 0) & (rows < len(table))
        return np.where(known, table[np.clip(rows, 0, len(table) - 1)], UNKNOWN)

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that left, came and moved since the last step."""
        if batch_update is None or not self.active:
            return
        for row in batch_update.removed:
            self.prompt[row] = self.stay[row] = self.answer[row] = UNKNOWN
            self.choice[row] = OWN
        for row, params, prompt, output in batch_update.added:
            self.prompt[row] = UNKNOWN if prompt is None else len(prompt)
            self.stay[row] = self._stay(output)
            self.answer[row] = getattr(params, "max_tokens", None) or UNKNOWN
            self.choice[row] = self._choice(params)
        for source, target, direction in batch_update.moved:
            swap = direction == MoveDirectionality.SWAP
            for table, nobody in (
                (self.prompt, UNKNOWN),
                (self.stay, UNKNOWN),
                (self.answer, UNKNOWN),
                (self.choice, OWN),
            ):
                moved, displaced = table[source], table[target]
                table[target], table[source] = moved, displaced if swap else nobody

    def _choice(self, params: Any) -> int:
        settings = self.offer.settings_for(asked_for(params))
        scored = self.offer.settings.policy.scored
        if scored is not None and scored.compiles:
            settings = replace(settings, compiled=compiled_for(params))
        if settings.chunks:
            settings = self._with_chunks(settings, taken_for(params))
        return self.choices.number(settings, self.choice.tolist())

    def _with_chunks(self, settings: Settings, taken: Taken | None) -> Settings:
        """A request that names chunks and lies in order is none that does. What was told once is
        told again when a row comes back to the batch."""
        if taken is None:
            return replace(settings, chunks=())
        if taken.ticket > self.ticket:
            self.taken.append(taken)
        return settings

    @classmethod
    def to_take(cls, vllm_config: Any) -> list[Taken]:
        """What the requests take that came since this was asked last, in their order."""
        router = cls._of_engine.get(id(vllm_config))
        if router is None or not router.taken:
            return []
        found = sorted(router.taken, key=lambda each: each.ticket)
        router.taken, router.ticket = [], found[-1].ticket
        return found

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
        if self.active:
            self.stay[req_idx], self.stays = self.stays, self.stays + 1
            self.answer[req_idx] = getattr(sampling_params, "max_tokens", None) or UNKNOWN
            self.choice[req_idx] = self._choice(sampling_params)
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any, context: Any = None) -> Any:
        return logits


def follow_drafts() -> None:
    """From now on the router sees the rows of every engine of this process."""
    compat.show_rows_beside_drafts(Router)


def _nobody(common: Any) -> NDArray[np.int64]:
    return np.full(common.num_reqs, UNKNOWN, np.int64)
