"""Compress on read, keep on cache: a prompt's pages return to the pool once they are packed.

When a request passes its first event (``kvplug.schedule``: its prompt's end), private blocks are
inserted into its row right behind it. The worker packs the kept tokens of the whole pages into
them in the same step; when that step is committed, the whole pages return to the pool *with their
hashes*: the next turn still hits the uncompressed prefix for as long as the memory is not needed.
Private blocks and what is decoded behind them are never hashed, so no other request can find them.
Later events pack into the same blocks, and return what they packed.

Where requests choose their policies, nothing that is decoded under any but ``dense`` is hashed: a
prompt's keys are the same for all of them, an answer's are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug import Course, Planner, Schedule
from kvplug_vllm import compat
from kvplug_vllm.settings import EvictionSettings, asked_for
from kvplug_vllm.streaming import give_back


@dataclass(frozen=True, kw_only=True)
class PackingSpec(FullAttentionSpec):
    """Full attention whose prompts are packed into ``private_blocks`` at most."""

    settings: EvictionSettings
    private_blocks: int
    budget: int | None = None
    """Tokens that these layers keep of a prompt, where the policy's layers differ."""

    layers: int = 1
    """That share a block: of one group."""
    in_flight: int = 1
    """Tokens of a request that are computed at once, at most."""

    def planner(self, request: Any) -> Planner:
        """What a request's own settings mean for these layers."""
        settings = self.settings.offer().settings_for(asked_for(request.sampling_params))
        return Planner(settings, self.block_size, self.budget)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        assert all(spec == specs[0] for spec in specs), (
            "layers of one group differ in their policy"
        )
        return replace(specs[0], layers=len(specs))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len) + self.private_blocks

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    @cache  # noqa: B019 -- frozen and hashable
    def most_blocks(self, tokens: int) -> int:
        """That any request of so many tokens holds at once, the first of its answer among them:
        its prompt may be all the others."""
        prompt = tokens - 1
        if self.settings.offer().mixed:
            whole = -(-tokens // self.block_size)
            return whole + min(self.private_blocks, prompt // self.block_size)
        planner = Planner(self.settings.offer().settings, self.block_size, self.budget)
        return planner.schedule.most_pages(prompt, self.in_flight, tokens)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the pool must know of a request that holds blocks."""

    prompt: int
    """Tokens of its original prompt."""
    course: Course
    schedule: Schedule
    policy: str
    hashed: int
    """Its first tokens whose blocks may serve other requests."""


class PackingManager(FullAttentionManager):
    """Rows are [prompt blocks | private blocks | decode blocks]; hashes stop at the prompt."""

    _looking_up: ClassVar[Any] = None
    """The request whose cached prefix vLLM is about to ask for."""

    def __init__(self, kv_cache_spec: PackingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.held: dict[str, Held] = {}
        """Each request that is being served."""

    @classmethod
    def look_up(cls, managers: Sequence[Any], request: Any) -> None:
        """A request comes, or comes back after a preemption."""
        cls._looking_up = request
        for manager in managers:
            if isinstance(manager, PackingManager):
                manager.held[request.request_id] = manager._hold(request)

    def _hold(self, request: Any) -> Held:
        planner, prompt = self.spec.planner(request), request.num_prompt_tokens
        policy, course = planner.settings.policy, planner.schedule.course(prompt)
        shared = self.spec.settings.offer().mixed and not policy.is_dense
        return Held(
            prompt=prompt,
            course=course,
            schedule=planner.schedule,
            policy=str(policy),
            hashed=min(course.begin, prompt) if shared else course.begin,
        )

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Stops before the first event, also on resume: the step that passes it packs, and a
        scorer that needs the last queries before it must have them computed."""
        request = cls._looking_up
        assert request is not None, "vLLM looks up a prefix without naming the request"
        planner = kv_cache_spec.planner(request)
        if planner.schedule.packs:
            scored = planner.scored
            last = scored.window if scored is not None and scored.needs_queries else 1
            begin = planner.schedule.course(request.num_prompt_tokens).begin
            max_length = min(max_length, max(begin - last, 0))
        return super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )

    def _with_private(self, request_id: str, num_tokens: int) -> int:
        """Tokens whose slots a row needs, private blocks counted as tokens."""
        course = self.held[request_id].course
        return num_tokens + course.private * self.block_size * (num_tokens > course.begin)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        needed = self._with_private(request_id, num_tokens)
        if apply_admission_cap:
            needed = self._at_most(self.held[request_id], num_tokens)
        return super().get_num_blocks_to_allocate(
            request_id,
            needed,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def _at_most(self, held: Held, num_tokens: int) -> int:
        """Tokens whose slots a request that is admitted needs together once: the whole prompt and
        its private blocks; of an answer that is packed too, what its events leave."""
        course = held.course
        whole = num_tokens + course.private * self.block_size * (num_tokens >= course.begin)
        if num_tokens <= course.begin or not course.every:
            return whole
        most = held.schedule.most_pages(held.prompt, self.spec.in_flight, num_tokens)
        return min(whole, most * self.block_size)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        needed = self._with_private(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, needed, num_tokens_main_model)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        held = self.held[request_id]
        # The worker packs in the step that passes an event; it must be committed.
        row = self.req_to_blocks.get(request_id)
        for first, last in held.course.freed(processed_computed_tokens):
            anew = not first and row and not row[0].is_null
            private = held.course.private if anew else 0
            give_back(self, request_id, first, last, held.policy, private)

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        held = self.held[request.request_id]
        if num_tokens > held.hashed:
            num_tokens = held.hashed // self.block_size * self.block_size
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self.held.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


compat.ensure_builtin_specs()
compat.announce_lookups(PackingManager.look_up)
KVCacheSpecRegistry.register(PackingSpec, PackingManager, uniform_type_base_spec=PackingSpec)
