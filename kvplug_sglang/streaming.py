"""Eviction by position: pages that no later query sees return to the pool, during prefill too.

Plans skip what a row no longer has, and it is left out when the request ends.
"""

from __future__ import annotations

from typing import Any

from kvplug_sglang.compat import Hook
from kvplug_sglang.settings import Engine


def evict(result: None, batch: Any) -> None:
    """Behind ``ScheduleBatch.maybe_evict_swa``, which SGLang calls before it allocates a step."""
    engine = Engine.serving()
    for req in batch.reqs:
        tenant = engine.router.tenants.get(req.rid)
        if tenant is None or not tenant.evicts:
            continue
        size = engine.page_size
        done = tenant.freed[-1][1] if tenant.freed else 0
        processed = req.prefix_len if batch.forward_mode.is_extend() else req.kv.kv_committed_len
        row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        for first, last in engine.planner(tenant.choice).evictable(processed):
            begin, end = max(first * size, done), last * size
            if begin < end:
                batch.token_to_kv_pool_allocator.free(row[begin:end].long())
                row[begin:end] = 0  # SGLang's dummy slot
                tenant.free(begin, end)
                engine.returned(tenant.choice, (end - begin) // size)
                engine.admit_again()


def free_row(original: Any, self: Any, kv: Any, ranges: list[tuple[int, int]]) -> None:
    """Around ``BasePrefixCache.free_kv_row``: what has left the row is not freed again."""
    tenant = Engine.serving().router.in_row(kv.req_pool_idx)
    for hole in tenant.freed if tenant is not None else ():
        ranges = [part for each in ranges for part in without(each, hole)]
    original(self, kv, ranges)


def without(span: tuple[int, int], hole: tuple[int, int]) -> list[tuple[int, int]]:
    """What a hole leaves of a span [first, last)."""
    parts = [(span[0], min(span[1], hole[0])), (max(span[0], hole[1]), span[1])]
    return [(first, last) for first, last in parts if first < last]


HOOKS = (
    Hook("sglang.srt.managers.schedule_batch.ScheduleBatch.maybe_evict_swa", "after", evict,
         ("self",)),
    Hook("sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.free_kv_row", "around", free_row,
         ("self", "kv", "ranges")),
)  # fmt: skip
