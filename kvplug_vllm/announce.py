"""A line in the log at start: what is active and what it means for a request of full length."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvplug import Planner
from kvplug_vllm.metrics import page_bytes
from kvplug_vllm.settings import Engine


def announce(engine: Engine, planner: Planner, spec: Any) -> None:
    offer, config = engine.offer, engine.vllm_config
    line = describe(planner, spec, config.model_config.max_model_len, config)
    if offer.mixed:
        line += f" Requests may choose {', '.join(offer.names)}"
        line += f" and keep at most {offer.max_tokens:,} tokens." if offer.max_tokens else "."
    say(engine, line)


def say(engine: Engine, line: str) -> None:
    """Once, however often it is told."""
    if line not in engine.announced:
        engine.announced.add(line)
        init_logger("vllm.kvplug").info("%s", line)


def describe(planner: Planner, spec: Any, tokens: int, vllm_config: Any) -> str:
    """What kvplug does to a request of so many tokens, in one line."""
    settings, size = planner.settings, planner.page_size
    policy, whole = settings.policy, -(-tokens // size)
    parts = [f"kvplug: {policy}, min_context {settings.min_context:,}, {_protected(planner)}."]
    if not policy.plans:
        return f"{parts[0]} Attention and cache are vLLM's own."
    in_flight, schedule = vllm_config.max_in_flight_tokens, planner.schedule
    held, most = f"holds {whole:,} blocks of {size} tokens", None
    if schedule.compiles:
        held += f"; of a compiled context {schedule.kept:,} of each {schedule.every:,}"
    elif planner.eviction is not None or schedule.appends:
        most = planner.most_pages(in_flight, tokens)
    elif schedule.streams:
        most = schedule.most_pages(tokens - 1, in_flight, tokens)
    if most is not None:
        held = f"holds at most {most:,} blocks of {size} tokens instead of {whole:,}"
    elif schedule.packs and not schedule.compiles:
        prompt = tokens - 1
        private = int(schedule.private_pages(np.array([prompt]))[0])
        if private and schedule.placement is not None:
            private = schedule.placement.pages
        left = private + (prompt % size > 0) if private else whole
        held = f"holds {left:,} blocks of {size} tokens once its prompt is done, {whole:,} before"
        if schedule.every:
            held += f"; its answer {schedule.every:,} more at most"
    parts.append(f"A request of {tokens:,} tokens {held}")
    if policy.format is not None:
        model = vllm_config.model_config
        layers = model.hf_text_config.num_hidden_layers
        layouts = policy.format.layouts(layers, size, spec.head_size, model.dtype)
        plain, coded = (sum(getattr(x, f"{n}_bytes") for x in layouts) for n in ("plain", "page"))
        parts.append(
            f"(a block is {plain / coded:.2f} times smaller than vLLM's, "
            f"{coded / layers / size:.0f} bytes a token, KV head and layer; the one that is being "
            "filled stays plain)"
        )
    tokens_bytes, digest = page_bytes(spec)
    if digest:
        parts.append(f"(a block is {digest / tokens_bytes:.1%} larger than vLLM's, for digests)")
    if planner.selector is not None:
        reads = int(planner.reads(np.array([tokens]))[0]) * planner.unit
        parts.append(f"and reads {reads:,} of them per KV head and step")
    return " ".join(parts) + "."


def _protected(planner: Planner) -> str:
    spans = [f"[{first:,}, {last:,})" for first, last in planner.settings.protect]
    return f"tokens {', '.join(spans)} protected" if spans else "no token protected"
