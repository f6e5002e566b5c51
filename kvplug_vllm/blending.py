"""Chunks of a prompt that are taken from wherever the prefix cache has them.

What a chunk is as a prompt of its own any request leaves there: one of the chunk alone, or one
that begins with it. A request that names chunks is looked up by them: if every page that it would
take is cached it lies in ``Arrangement.order`` from then on, with blocks of its own for what it
takes, which count as cached and which the workers fill before the step that computes the rest.
Else, and where its plain prefix has as much, it is served in order, as vLLM serves it. That is
asked again each time it is admitted.

What it takes is held until a later step is scheduled; what other requests compute in the same step
is not there yet. Its own blocks are hashed, behind a prefix that its first chunk may be, under all
the chunks and the policy: who comes with the same ones finds them as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvplug import Arrangement, Settings, arrange, rearranged
from kvplug_vllm import compat
from kvplug_vllm.settings import EvictionSettings, Taken, asked_for, tell_taken


@dataclass(frozen=True, kw_only=True)
class BlendingSpec(FullAttentionSpec):
    """Full attention whose requests may take chunks from elsewhere in the cache."""

    settings: EvictionSettings

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        assert all(spec == specs[0] for spec in specs), (
            "layers of one group differ in their policy"
        )
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())

    def settings_of(self, request: Any) -> Settings:
        return self.settings.offer().settings_for(asked_for(request.sampling_params))


@dataclass(kw_only=True)
class Asked:
    """A request that names chunks."""

    prompt: list[int]
    """As it is read."""
    salt: str | None
    """The user's."""
    arrangement: Arrangement
    names: list[list[bytes]]
    """Of the pages of each chunk, as a prompt of its own, in the prefix cache."""
    moved: bool = False
    """Whether the request lies as arranged."""
    named: dict[bool, list[bytes]] = field(default_factory=dict)
    """What its blocks were called when it last lay so."""

    @cached_property
    def rearranged(self) -> list[int]:
        return rearranged(self.prompt, self.arrangement)

    @property
    def prefix(self) -> list[bytes]:
        """Names of the pages that it takes from where they are: those that it begins with."""
        first = self.arrangement.placed[0]
        return self.names[first.chunk][: first.pages.stop] if first.start == 0 else []

    def own(self, line: str) -> bytes:
        """What tells pages of a request with these chunks from all others."""
        contents = [names[-1].hex() if names else "" for names in self.names]
        return self.arrangement.own(line, self.salt, contents)

    def source(self, page: int) -> tuple[bytes, int]:
        """The name of a page that it takes, and how far its keys move."""
        chunk, number, shift = (int(each[page]) for each in self.arrangement.sources)
        return self.names[chunk][number], shift


@dataclass(kw_only=True)
class Taking:
    """What a request that is being admitted takes: after what it found under its own names."""

    pages: int
    """Its first ones, that count as cached."""
    sources: list[Any] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> list[Any]:
        """The sources, each once."""
        return list({block.block_id: block for block in self.sources}.values())


class BlendingManager(FullAttentionManager):
    _looking_up: ClassVar[Taking | None] = None
    """Of the request whose cached prefix vLLM is about to ask for."""
    _tickets: ClassVar[Any] = count(1)

    def __init__(self, kv_cache_spec: BlendingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.asked: WeakKeyDictionary[Any, Asked] = WeakKeyDictionary()
        self.taking: dict[str, tuple[Any, Taking]] = {}
        """Requests that were looked up and are not admitted yet, if they take chunks."""
        self.held: dict[str, list[Any]] = {}
        """Blocks that requests take from, in the step that was scheduled last."""
        self.new: set[int] = set()
        """Blocks that the step that is being scheduled computes."""

    def new_step_starts(self) -> None:
        self.new.clear()

    @classmethod
    def look_up(cls, managers: Sequence[Any], request: Any) -> None:
        """A request comes, or comes back after a preemption."""
        cls._looking_up = None
        for manager in managers:
            if isinstance(manager, BlendingManager):
                cls._looking_up = manager._arrange(request)

    def _arrange(self, request: Any) -> Taking | None:
        settings = self.kv_cache_spec.settings_of(request)
        tell_taken(request.sampling_params, None)
        self.taking.pop(request.request_id, None)
        if not settings.chunks or request.num_prompt_tokens <= settings.min_context:
            return None
        if request not in self.asked:
            self.asked[request] = self._read(request, settings)
        asked = self.asked[request]
        self._lie(request, asked, moved=False)
        if request.skip_reading_prefix_cache or not asked.arrangement.cached:
            return None
        plain = self._found(request)
        self._lie(request, asked, moved=True)
        taking = self._take(asked, self._found(request))
        if taking is None or taking.pages <= plain:
            self._lie(request, asked, moved=False)
            return None
        self.taking[request.request_id] = request, taking
        return taking

    def _read(self, request: Any, settings: Settings) -> Asked:
        prompt = list(request.prompt_token_ids)  # the list that came is the user's
        reuse = settings.policy.reuse
        assert reuse is not None
        return Asked(
            prompt=prompt,
            salt=request.cache_salt,
            arrangement=arrange(reuse, settings.chunks, len(prompt), self.block_size),
            names=[
                compat.names_alone(request, prompt[first:last]) for first, last in settings.chunks
            ],
        )

    def _lie(self, request: Any, asked: Asked, moved: bool) -> None:
        """Let a request's tokens lie in the order of its prompt, or as arranged, and have their
        names."""
        if asked.moved == moved:
            return
        asked.named[asked.moved] = request.block_hashes
        asked.moved, known = moved, asked.named.get(moved)
        if not moved:
            assert known is not None
            compat.reorder(request, asked.prompt, asked.salt, known)
            return
        own, prefix = asked.own(self.kv_cache_spec.settings.policy), asked.prefix
        behind = [hashlib.sha256(prefix[-1] + own).digest()] if prefix else []
        names = [*prefix[:-1], *behind] if known is None else known
        compat.reorder(request, asked.rearranged, own.hex(), names)
        request.block_hashes[: len(prefix)] = prefix

    def _found(self, request: Any) -> int:
        """Pages that a request finds under the names that it has now."""
        found = 0
        for name in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            if not self.block_pool.get_cached_block(name, [self.kv_cache_group_id]):
                break
            found += 1
        return found

    def _take(self, asked: Asked, found: int) -> Taking | None:
        """What a request that lies as arranged takes, of whose pages so many are there; None where
        one is missing."""
        taking = Taking(pages=max(found, asked.arrangement.cached))
        if found < len(asked.prefix):
            return None
        for page in range(found, asked.arrangement.cached):
            name, shift = asked.source(page)
            blocks = self.block_pool.get_cached_block(name, [self.kv_cache_group_id])
            if not blocks or blocks[0].block_id in self.new:
                return None
            taking.sources.append(blocks[0])
            taking.shifts.append(shift)
        return taking

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
        """Null blocks stand for pages that are to be taken."""
        rows, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )
        taking = cls._looking_up
        if taking is None or not taking.sources:
            return rows, length
        (row,) = rows
        assert len(row) + len(taking.sources) == taking.pages
        row = [*row, *[block_pool.null_block] * len(taking.sources)]
        return (row,), taking.pages * kv_cache_spec.block_size

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any,
        **kwargs: Any,
    ) -> int:  # fmt: skip
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        if not new_computed_blocks or request_id not in self.taking:
            return needed
        _, taking = self.taking[request_id]
        found = {block.block_id for block in new_computed_blocks}
        others = [block for block in taking.blocks if block.block_id not in found]
        return needed + len(taking.sources) + self._get_num_evictable_blocks(others)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        """Admitted: what it takes is held from now on, and has somewhere to go."""
        request, taking = self.taking.pop(request_id, (None, Taking(pages=0)))
        found = [block for block in new_computed_blocks if not block.is_null]
        super().add_local_computed_blocks(request_id, found, *args, **kwargs)
        if request is None:
            return
        mine = {block.block_id for block in found}
        self.held[request_id] = [block for block in taking.blocks if block.block_id not in mine]
        self.block_pool.touch(self.held[request_id])
        into = self.block_pool.get_new_blocks(len(taking.sources))
        self.req_to_blocks[request_id].extend(into)
        taken = Taken(
            ticket=next(self._tickets),
            sources=[block.block_id for block in taking.sources],
            into=[block.block_id for block in into],
            shifts=taking.shifts,
        )
        tell_taken(request.sampling_params, taken)

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        row = self.req_to_blocks[request.request_id]
        self.new.update(block.block_id for block in row[before:after])

    def remove_skipped_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """The step that took them was scheduled before: what comes later may write over them."""
        self.block_pool.free_blocks(reversed(self.held.pop(request_id, [])))
        super().remove_skipped_blocks(request_id, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self.taking.pop(request_id, None)
        return [*super().pop_blocks_for_free(request_id), *self.held.pop(request_id, [])]


compat.ensure_builtin_specs()
compat.announce_lookups(BlendingManager.look_up)
compat.tell_with_steps()
KVCacheSpecRegistry.register(BlendingSpec, BlendingManager, uniform_type_base_spec=BlendingSpec)
