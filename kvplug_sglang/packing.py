"""Compress on read, keep on cache: a prompt's slots return to the radix tree once it is packed.

A request that will be compressed gets private slots when it is admitted. The backend packs the
kept tokens of the prompt's whole pages into them in the step that ends the prompt, and when that
step's result is checkpointed into the tree, the private slots take the place of the last of those
pages in the request's row and the tree is unlocked: the prompt stays in it, evictable, for the
next turn to hit. What the request owns is then one run of its row, as SGLang expects, so that its
own freeing and its leak checks are exact. Nothing decoded behind a compressed prompt is inserted.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from kvplug import Course, Planner, Refused, Settings, Stage
from kvplug_sglang.compat import Hook
from kvplug_sglang.router import Tenant
from kvplug_sglang.settings import Engine

log = logging.getLogger("sglang.kvplug")

FOREVER = 1 << 30
TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"


def admit(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """Behind ``Req.__init__``: what the request asks for, settled once. Bad ones are refused."""
    engine = Engine.serving()
    self.kvplug_asked = None  # for chunks: known once it is queued
    try:
        self.kvplug_settings = engine.choose(self.sampling_params, self.session is not None)
    except ValueError as error:
        self.kvplug_settings = Settings()
        self.set_finish_with_abort(str(error))
        engine.refused(error)
        return
    self.cache_salt = engine.offer.salt(self.kvplug_settings, self.cache_salt)
    if evicts_by_position(self):
        # Holes would be shared, or what they leave be locked: SGLang's tree keeps whole prefixes.
        self.skip_radix_cache_insert = True


def refuse_beams(original: Any, self: Any, req: Any, recv_req: Any) -> str | None:
    """Around a beam search's own checks: its message to the client, None for none."""
    engine = Engine.serving()
    if engine.dense:
        error: str | None = original(self, req, recv_req)
        return error
    refused = Refused(
        "beam search",
        "kvplug: beam search hands rows of the pool, which a policy may have rewritten, from one "
        "beam to another; drop beam_width",
    )
    if req.to_finish is None:  # else it was refused, and counted, when it came
        engine.refused(refused)
    return str(refused)


def planner_of(req: Any) -> Planner:
    """Of a request that may hold nothing yet, so that its settings may have no number."""
    return Engine.serving().planners.planner(req.kvplug_settings)


def evicts_by_position(req: Any) -> bool:
    """Whether a request may lose pages before it ends, by position alone."""
    planner = planner_of(req)
    if planner.eviction is None:
        return False
    longest_answer = req.sampling_params.max_new_tokens or FOREVER  # SGLang settles it later
    most = len(req.origin_input_ids) + longest_answer
    return bool(planner.evictable(most))


def course_of(req: Any) -> Course | None:
    """When the request is packed; None where it stays whole to its end."""
    prompt = len(req.origin_input_ids)
    course = planner_of(req).schedule.course(prompt)
    longest_answer = req.sampling_params.max_new_tokens or FOREVER  # SGLang settles it later
    return course if course.begin <= prompt + longest_answer else None


def private_tokens(req: Any) -> int:
    """Slots that will hold what is kept of the request; 0 where it stays whole."""
    course = course_of(req)
    return 0 if course is None else course.private * course.page_size


def uncached(original: Any, self: Any) -> tuple[int, int]:
    """Around the leak checker's sum of what requests own outside the tree: what stands in no row
    yet, and what has left one already."""
    full, windowed = original(self)
    for tenant in Engine.serving().router.tenants.values():
        if tenant.slots is not None and not tenant.swapped:
            full += len(tenant.slots)
        full -= sum(last - first for first, last in tenant.freed)
    return full, windowed


def last_tokens(original: Any, self: Any, req: Any = None) -> int:
    """Around what a prefix match leaves to be computed: the window that a score asks for, also of
    a request that has come back with its answer; all of a private request."""
    least: int = original(self, req)
    if req is None:
        return least
    tokens = len(req.origin_input_ids) + len(req.output_ids)
    if evicts_by_position(req):
        return tokens
    course, scored = course_of(req), planner_of(req).scored
    if course is None or scored is None:
        return least
    window = scored.window if scored.needs_queries else 1
    return max(least, tokens - max(course.begin - window, 0))


def allocate(result: Any, batch: Any) -> None:
    """Behind ``alloc_for_extend``: every request of the batch becomes known to the backend."""
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    engine = Engine.serving()
    for req in batch.reqs:
        if req.rid in engine.router.tenants:
            continue
        tenant = Tenant(
            engine.choice(req.kvplug_settings),
            len(req.origin_input_ids),
            row=req.kv.req_pool_idx,
            evicts=evicts_by_position(req),
        )
        engine.router.enter(req.rid, tenant)
        wanted = private_tokens(req)
        if not wanted:
            continue
        allocator = batch.token_to_kv_pool_allocator
        evict_from_tree_cache(batch.tree_cache, wanted)
        slots = allocator.alloc(wanted)
        if slots is None:
            stay_whole(engine, req, tenant)
            continue
        tenant.slots, tenant.private = slots, wanted // engine.page_size
        tenant.course = course_of(req)
        pages = slots[:: engine.page_size] // engine.page_size
        engine.router.settle(tenant.row, pages)


def stay_whole(engine: Engine, req: Any, tenant: Tenant) -> None:
    """Admission has charged the private slots, so this takes a pool that others outran."""
    log.warning("kvplug: no room to compress %s, which is served whole", req.rid)
    settings = engine.planner(tenant.choice).settings
    whole = replace(settings, policy=settings.policy.without(Stage.COMPRESS))
    tenant.choice = engine.choice(whole)
    if engine.metrics is not None:
        engine.metrics.count_whole()


def checkpoint(original: Any, self: Any, req: Any, *, up_to: int, **kwargs: Any) -> None:
    """Around the tree's checkpoint: of the prompt goes in what comes before it is packed, and once
    that has and is packed, it is given up."""
    tenant = Engine.serving().router.tenants.get(req.rid)
    if tenant is None or tenant.course is None:
        original(self, req, up_to=up_to, **kwargs)
        return
    end = min(up_to, tenant.prompt, tenant.course.begin)
    if end < up_to and self.supports_mamba():
        end = 0  # a recurrent state is one of ``up_to``, and would be kept for what comes before
    original(self, req, up_to=end, **kwargs)
    if tenant.course.begin == tenant.prompt <= up_to and not req.finished():
        swap(self, req, tenant)


def give_back(result: None, batch: Any) -> None:
    """Behind ``ScheduleBatch.maybe_evict_swa``, which SGLang calls before it allocates a step:
    tokens that were packed, but for a prompt that waits for the tree."""
    engine = Engine.serving()
    for req in batch.reqs:
        tenant = engine.router.tenants.get(req.rid)
        if tenant is None or tenant.course is None or not tenant.course.every:
            continue
        processed = req.prefix_len if batch.forward_mode.is_extend() else req.kv.kv_committed_len
        end = tenant.course.packed(processed) * engine.page_size
        if end and not tenant.swapped:
            if tenant.course.begin == tenant.prompt:
                continue  # the tree has not taken the prompt yet
            swap(batch.tree_cache, req, tenant)
        begin = tenant.freed[-1][1] if tenant.freed else whole_pages(tenant)
        if begin < end:
            row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
            batch.token_to_kv_pool_allocator.free(row[begin:end].long())
            row[begin:end] = 0  # SGLang's dummy slot
            tenant.free(begin, end)
            engine.returned(tenant.choice, (end - begin) // engine.page_size)
            engine.admit_again()


def whole_pages(tenant: Tenant) -> int:
    """Tokens of the pages that its first event packs."""
    assert tenant.course is not None
    return tenant.course.begin // tenant.course.page_size * tenant.course.page_size


def swap(tree: Any, req: Any, tenant: Tenant) -> None:
    """[whole pages | rest] -> [nothing | private slots | rest], in the request's row."""
    assert tenant.slots is not None and not tenant.swapped
    engine = Engine.serving()
    kv, end = req.kv, whole_pages(tenant)
    begin = end - len(tenant.slots)
    if kv.cache_protected_len < end:  # the tree took less, or nothing (--disable-radix-cache)
        tree.free_kv_row(kv, [(kv.cache_protected_len, end)])
    row = tree.req_to_token_pool.req_to_token[kv.req_pool_idx]
    row[:begin] = 0
    row[begin:end] = tenant.slots.to(row.dtype)
    kv.cache_protected_len = begin
    tree.unlock(req.lock)
    req.lock = None
    req.last_node = tree.root_node_handle(req.extra_key)
    tenant.swapped, tenant.shared = True, not req.skip_radix_cache_insert
    req.skip_radix_cache_insert = True
    engine.returned(tenant.choice, end // engine.page_size, tenant.private)
    engine.admit_again()


def release(result: None, self: Any, req: Any, *, checkpointed: bool) -> None:
    """Behind the end of a request's hold on its row: finished, aborted or retracted."""
    tenant = Engine.serving().router.leave(req.rid)
    if tenant is None or tenant.slots is None:
        return
    if tenant.swapped:
        req.skip_radix_cache_insert = not tenant.shared
    else:
        self.token_to_kv_pool_allocator.free(tenant.slots)


HOOKS = (
    Hook("sglang.srt.managers.schedule_batch.Req.__init__", "after", admit, ("self", "rid")),
    Hook(
        "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init",
        "around",
        refuse_beams,
        ("self", "req", "recv_req"),
    ),
    Hook("sglang.srt.mem_cache.allocation.alloc_for_extend", "after", allocate, ("batch",)),
    Hook(f"{TREE}.checkpoint", "around", checkpoint, ("self", "req", "up_to")),
    Hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.maybe_evict_swa",
        "after",
        give_back,
        ("self",),
    ),
    Hook(f"{TREE}.on_release", "after", release, ("self", "req", "checkpointed")),
    Hook(f"{TREE}.swa_reprefill_tail_tokens", "around", last_tokens, ("self", "req")),
    Hook(
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
        "._get_total_uncached_sizes",
        "around",
        uncached,
        ("self",),
    ),
)
