"""Whether kvplug works in the scheduler that was just built, found out by doing."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

from kvplug import ChunkReuse, Settings, arrange, parse, read_offer
from kvplug.doctor import Check
from kvplug_sglang import backend, blending, compat, hooks, packing
from kvplug_sglang.router import OWN
from kvplug_sglang.settings import NAME, Engine, given, remember

log = logging.getLogger("sglang.kvplug")


def examine(scheduler: Any) -> None:
    """Once every hook is in place. Raises RuntimeError that says which fails and what to do."""
    engine = Engine.serving()
    compat.verify_bindings(scheduler)
    engine.scheduler = scheduler
    counters, engine.metrics = engine.metrics, None  # nobody asked for the canary
    canary(scheduler.tree_cache, engine)
    if engine.offer.settings.policy.reuse is not None:
        canary_of_chunks(scheduler.tree_cache, engine, engine.offer.settings.policy.reuse)
    engine.metrics = counters
    policy = engine.offer.settings.policy
    if policy.eviction is not None:
        log.warning(
            "kvplug: a request that %s will take pages from is private: it neither uses nor fills "
            "the prefix cache",
            policy.eviction.name,
        )
    if not policy.uniform:
        widest = engine.planner(OWN).schedule.most_private * engine.page_size
        log.warning(
            "kvplug: one of SGLang's slots spans all layers, so under %s a compressed prompt "
            "holds the %d slots of its widest layer, not the mean",
            policy,
            widest,
        )
    if engine.metrics is not None:
        log.info(
            "kvplug serves %s over %s (%d hooks verified)",
            engine.offer,
            backend.kernels(scheduler.server_args),
            len(hooks.HOOKS),
        )


def checks(model: str | None, policy: str | None) -> Iterator[Check]:
    """What can be said without a server; one that raises has failed, and its error says why.

    policy: what a server started from this process would be given too.
    """
    yield Check.of("versions", _versions)
    if policy is not None:
        remember(policy)
        yield Check.of("policy", lambda: str(read_offer(given(), environ={}).settings.policy))
    if model is not None:
        yield Check.of("model", lambda: _model(model))


def _versions() -> str:
    found = version("sglang")
    if not compat.supported():
        raise ValueError(
            f"kvplug was tested with sglang 0.5.23, got {found}: pip install sglang==0.5.23"
        )
    return f"kvplug {version('kvplug')}, sglang {found}, torch {torch.__version__}"


def _model(model: str) -> str:
    """Resolve a server's arguments as its launcher does, refusals and all."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    arguments = ServerArgs(model_path=model, attention_backend=NAME)
    arguments.resolve_once()
    return f"nothing is refused; it would be served over {backend.kernels(arguments)}"


def canary(tree: Any, engine: Engine) -> None:
    """Lead a request of four pages through the idle pools, keep one, and count every slot."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.common import release_kv_cache
    from sglang.srt.sampling.sampling_params import SamplingParams

    size, tokens = engine.page_size, 4 * engine.page_size
    allocator, rows = tree.token_to_kv_pool_allocator, tree.req_to_token_pool
    untouched = counts(tree)
    parameters = SamplingParams(max_new_tokens=1)
    parameters.normalize(None)
    request = Req("canary", "", array("q", range(1, tokens + 1)), parameters, extra_key="canary")
    policy = parse(f"knorm(budget={size}, sinks=0)")
    request.kvplug_settings = Settings(policy=policy)
    request.init_next_round_input(tree)
    request.lock = tree.lock(request.last_node)
    rows.alloc([request])
    request.extend_end = tokens
    slots = allocator.alloc(tokens)
    rows.write((request.kv.req_pool_idx, slice(0, tokens)), slots.int())
    request.kv.kv_allocated_len = request.kv.kv_committed_len = tokens

    packing.allocate(None, SimpleNamespace(
        reqs=[request], tree_cache=tree, token_to_kv_pool_allocator=allocator,
    ))  # fmt: skip
    tree.checkpoint(request, up_to=tokens)
    kept = tokens if compat.keeps_prompts(tree) else 0
    expect("checkpoint", counts(tree), untouched.after(used=kept + size, evictable=kept))
    release_kv_cache(request, tree, checkpoint=True)
    expect("on_release", counts(tree), untouched.after(used=kept, evictable=kept))
    tree.reset()
    rows.clear()
    allocator.clear()
    expect("reset", counts(tree), untouched)


def canary_of_chunks(tree: Any, engine: Engine, reuse: ChunkReuse) -> None:
    """Let a request look for a chunk that was read alone, of two pages more than it computes
    anew, and count every slot and page."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    size = engine.page_size
    allocator = tree.token_to_kv_pool_allocator
    chunk = array("q", range(1, (-(-reuse.computed_from_start() // size) + 2) * size + 1))
    untouched = counts(tree)
    slots = allocator.alloc(len(chunk))
    if slots is None:
        return  # of no chunk that fits into the pool would a page be taken
    compat.publish(tree, chunk, slots, 0, None, None)
    kept = len(chunk)
    expect("insert", counts(tree), untouched.after(used=kept, evictable=kept))
    prompt, spans = array("q", [0]) + chunk + array("q", [0]), ((1, 1 + len(chunk)),)
    parameters = SamplingParams(max_new_tokens=1)
    parameters.normalize(None)
    request = Req("canary", "", prompt, parameters)
    request.kvplug_settings = replace(engine.offer.settings, chunks=spans, min_context=0)
    blending.ask(None, request)
    request.init_next_round_input(tree)
    wanted = arrange(reuse, spans, len(prompt), size)
    (taken,), kept = engine.to_take(), kept + 2 * size
    expect("match_prefix", counts(tree), untouched.after(used=kept, evictable=kept))
    found = [
        list(request.origin_input_ids), request.prefix_len, taken.shifts.tolist(),
        taken.sources.tolist(), taken.into.tolist(),
    ]  # fmt: skip
    copied = tree.prefix_device_indices(request)[::size] // size
    hoped = [
        [prompt[place] for place in wanted.order.tolist()], 2 * size, [1, 1],
        (slots[-2 * size :: size] // size).tolist(), copied.tolist(),
    ]  # fmt: skip
    if found != hoped:
        raise RuntimeError(
            compat.broken("Req.init_next_round_input", f"a chunk is taken as {found}, not {hoped}")
        )
    tree.reset()
    allocator.clear()
    expect("reset", counts(tree), untouched)


@dataclass(frozen=True)
class Counts:
    """Slots of the pool."""

    available: int
    evictable: int
    protected: int

    def after(self, used: int, evictable: int) -> Counts:
        return Counts(self.available - used, self.evictable + evictable, self.protected)


def counts(tree: Any) -> Counts:
    available = tree.token_to_kv_pool_allocator.available_size()
    return Counts(available, tree.evictable_size(), tree.protected_size())


def expect(step: str, found: Counts, wanted: Counts) -> None:
    if found != wanted:
        raise RuntimeError(
            compat.broken(f"UnifiedRadixCache.{step}", f"slots are {found}, not {wanted}")
        )
