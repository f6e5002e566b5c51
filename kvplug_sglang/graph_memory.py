"""What decode graphs hold of kvplug's, told to SGLang before it sizes the pool.

A graph keeps the memory that its operations allocate, and all graphs share one pool of it: that of
the largest batch. Layers follow one another, so one layer's temporaries are all of theirs.
"""

from __future__ import annotations

from typing import Any

from kvplug import (
    BatchPlanner,
    HeadBudgets,
    Offer,
    PageFormat,
    TokenSelector,
    block_bytes,
    read_offer,
)
from kvplug.coded import step_bytes
from kvplug_sglang import compat
from kvplug_sglang.backend import TRITON, stock
from kvplug_sglang.compression import packing_bytes
from kvplug_sglang.refusals import REQUESTS, default_page, unsupported
from kvplug_sglang.settings import given

MIB = 1 << 20
PLANNING = 32
"""Bytes of what is computed for a page of a request while its table is planned."""
HEADS = 32
"""The same for a page of one of its heads, where those have tables of their own."""


def decide(server_args: Any) -> None:
    """Before SGLang sizes memory: it would count on graphs of prefill that kvplug turns off, and
    then leave next to nothing for prefill without them."""
    if _sparse() is not None:
        view, _ = compat.resolved(server_args)
        compat.declare(server_args, compat.graphs_of_decode_alone(view))


def reserve(server_args: Any) -> float:
    """MiB beside what SGLang reckons for its own graphs: what ours hold, what packing a prompt, or
    choosing what its queries read, takes, and what a step does where pages are codes."""
    offer = _sparse()
    if offer is None:
        return 0.0
    view, model = compat.resolved(server_args)
    batch = compat.decode_batch(view)
    if any(offer.settings.policy.misfits(model.hf_text_config)):
        return 0.0  # refused a little later
    size = view.page_size or default_page(offer) or 1
    lists = stock(server_args, view.device) == TRITON
    splits = view.triton_attention_num_kv_splits if lists else 0
    held = graph_bytes(offer, model, view.tp_size, batch, size, splits)
    dtype = compat.cache_dtype(view, model)
    packing = packing_bytes(offer, model, view.tp_size, size, dtype)
    queries = compat.prefill_tokens(view, model)
    choosing = choosing_bytes(offer, model, view.tp_size, size, queries, bool(lists))
    decoded = 0 if offer.format is None else decoded_bytes(offer.format, view, model, size)
    return (held + max(packing, choosing) + decoded) / MIB


def _sparse() -> Offer | None:
    """What a server offers beside dense attention."""
    try:
        offer = read_offer(given(), environ={})
    except ValueError:
        return None  # refused a little later, together with all other reasons
    if list(unsupported(offer)):
        return None  # as is this
    return None if offer.settings.policy.is_dense and not offer.mixed else offer


def decoded_bytes(format: PageFormat, view: Any, model: Any, page_size: int) -> int:
    """On one rank, of a step in a layer."""
    try:
        layout = format.in_layer(0).layout(page_size, model.head_dim, model.dtype)
    except ValueError:
        return 0  # refused a little later
    rows, queries = view.max_running_requests or REQUESTS, compat.prefill_tokens(view, model)
    heads, query_heads = model.get_num_kv_heads(view.tp_size), model.num_attention_heads
    groups = query_heads // view.tp_size // heads
    return step_bytes(layout, heads, groups, queries + rows, rows, model.context_len)


def choosing_bytes(
    offer: Offer, model: Any, ranks: int, page_size: int, queries: int, lists: bool
) -> int:
    """The most that choosing pages for prompts' queries, so many in a step, takes on one rank, by
    each policy that a request may have; layer by layer. lists: of tokens are read, not tables."""
    heads, query_heads = model.get_num_kv_heads(ranks), model.num_attention_heads // ranks
    longest, read = model.context_len, 4 + (8 * page_size if lists else 4)
    found = 0
    for selector in offer.block_selectors:
        room = block_bytes(
            selector, queries, heads, query_heads // heads, model.head_dim, longest, page_size
        )
        width = -(-min(selector.budget, longest) // page_size)
        chosen = -(-queries // selector.block) * heads * width * read
        found = max(found, room + chosen)
    return found


def graph_bytes(
    offer: Offer, model: Any, ranks: int, batch: int, page_size: int, kv_splits: int
) -> int:
    """On one rank. batch: of the largest graph, 0 for none; kv_splits: of Triton's decode kernel,
    which reads lists of tokens; 0 where FlashAttention reads page tables."""
    planners = BatchPlanner(page_size)
    planners.know([offer.settings])
    own, policy = planners.planners[0], offer.settings.policy
    tables = 1 if policy.uniform else len(set(policy.layer_budgets(model.num_hidden_layers)))
    pages = -(-model.context_len // page_size)
    heads, query_heads = model.get_num_kv_heads(ranks), model.num_attention_heads // ranks
    found = (PLANNING + 4 * tables) * pages
    if kv_splits:
        found += 4 * query_heads * kv_splits * (model.head_dim + 1)
        if own.scored or own.eviction or offer.mixed:
            found += 8 * tables * pages * page_size
    if isinstance(own.scored, HeadBudgets):
        kinds = {own.scored.kinds(layer) for layer in range(model.num_hidden_layers)} - {None}
        found += heads * pages * HEADS
        found += len(kinds) * heads * pages * (4 + (8 * page_size if kv_splits else 0))
    if own.selector is not None:
        scored = query_heads if isinstance(own.selector, TokenSelector) else heads
        read = 8 * own.unit if kv_splits else 4
        found += 4 * scored * (pages * page_size // own.unit)
        found += heads * (4 + read) * own.width(model.context_len)
    return batch * found
