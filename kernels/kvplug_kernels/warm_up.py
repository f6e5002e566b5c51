"""Compile what selection runs on a CPU before the first request has to wait for it (seconds)."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from kvplug_kernels.code_layout import code_rows
from kvplug_kernels.code_logits import code_logits
from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.dispatch import CompiledCpu, wants_compiled
from kvplug_kernels.key_codes import update_key_codes
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_digest import update_page_digest
from kvplug_kernels.page_layout import PageLayout
from kvplug_kernels.page_select import page_select
from kvplug_kernels.resident_pages import EMPTY, resident_pages
from kvplug_kernels.sparse_decode import sparse_decode
from kvplug_kernels.token_select import token_select
from kvplug_kernels.virtual_heads import virtual_heads


def warm_up(
    dtype: torch.dtype,
    cached: torch.dtype | None = None,
    pages: bool = True,
    tokens: bool = True,
    layout: PageLayout | None = None,
    host: bool = False,
) -> None:
    """Both the serial and the threaded forms, for this process from now on. dtype: the queries',
    and the cache's unless that has another. pages, tokens: what will be chosen, layout: what will
    be read of codes, host: whether pages come from there; the others' code is compiled when it is
    first called.

    Does nothing without Numba. Call it in a process that will start no other vLLM engine: vLLM
    0.32 cannot start one where Numba is loaded (its scan for Triton kernels stumbles over
    llvmlite's library object).
    """
    if find_spec("numba") is None:
        return
    CompiledCpu.enabled = True
    if not wants_compiled(torch.empty(0, dtype=dtype)):
        return
    for width in (1, 1 << 15):
        if pages:
            choose_pages(dtype, cached or dtype, width)
        if tokens:
            choose_tokens(dtype, cached or dtype, width)
        if layout is not None:
            read_codes(layout, width)
        if host:
            bring_pages(cached or dtype, width)


def read_codes(layout: PageLayout, width: int) -> None:
    """Of as many tokens and more, all in the first page."""
    pages = -(-width // layout.page_size)
    cache = torch.zeros(1, 1, layout.page_bytes, dtype=torch.uint8)
    plain = torch.zeros(1, layout.page_size, 1, layout.head_size, dtype=layout.dtype)
    first = torch.zeros(1, dtype=torch.int32)
    table = torch.zeros(1, pages, dtype=torch.int32)
    decode_pages(cache, table[0], layout)
    lengths = torch.full((1,), pages * layout.page_size, dtype=torch.int32)
    coded_decode(
        plain[:, 0], cache, layout, plain, plain, first, table, None, None, lengths, 1.0
    )  # fmt: skip


def choose_pages(dtype: torch.dtype, cached: torch.dtype, width: int) -> None:
    """Of one token each, all the first one."""
    digest = torch.zeros(1, 1, 2, 64, dtype=cached)
    counts = torch.full((1,), width, dtype=torch.int32)
    table = torch.zeros(1, width, dtype=torch.int32)
    scores = page_bound(torch.zeros(1, 1, 64, dtype=dtype), digest, table, counts)
    chosen, taken = page_select(scores, counts, torch.ones_like(counts), 1)
    virtual_heads(table, chosen, taken, counts, 1, 1, 1)
    update_page_digest(
        digest, torch.zeros(width, 1, 64, dtype=cached), torch.zeros(width).long(), 1
    )


def bring_pages(cached: torch.dtype, width: int) -> None:
    """One, to the first of as many hot pages as tokens."""
    pages = torch.zeros(width, 1, 1, 64, dtype=cached)
    held = torch.full((width, 1), EMPTY, dtype=torch.int32)
    hot = torch.arange(width, dtype=torch.int32)[None]
    one = torch.ones(1, dtype=torch.int32)
    resident_pages(pages, held, pages, hot, hot, one, hot[:, None], one[:, None], one)


def choose_tokens(dtype: torch.dtype, cached: torch.dtype, width: int) -> None:
    """Of as many pages, all the first one."""
    S, D, bits = 8, 64, 2
    lengths = torch.full((1,), width * S, dtype=torch.int32)
    keys = torch.zeros(1, S, 1, D, dtype=cached)
    codes = torch.zeros(1, 1, code_rows(S, bits, cached.itemsize), D, dtype=cached)
    query = torch.zeros(1, 1, D, dtype=dtype)
    table = torch.zeros(1, width, dtype=torch.int32)
    update_key_codes(codes, keys, torch.full((width * S,), -1), bits)
    logits = code_logits(query, codes, table, lengths // S, S, bits)
    chosen, taken = token_select(logits, 1, lengths, S, lengths, width * S, 1.0)
    sparse_decode(query, keys, keys, table, chosen, taken, lengths, 1.0, unit=1)
