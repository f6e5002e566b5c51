"""Compile what selection runs on a CPU before the first request has to wait for it (seconds)."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from kvplug_kernels.code_layout import code_rows
from kvplug_kernels.code_logits import code_logits
from kvplug_kernels.dispatch import CompiledCpu, wants_compiled
from kvplug_kernels.key_codes import update_key_codes
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_digest import update_page_digest
from kvplug_kernels.page_select import page_select
from kvplug_kernels.sparse_decode import sparse_decode
from kvplug_kernels.token_select import token_select
from kvplug_kernels.virtual_heads import virtual_heads


def warm_up(dtype: torch.dtype) -> None:
    """Both the serial and the threaded forms, for this process from now on.

    Does nothing without Numba. Call it in a process that will start no other vLLM engine: vLLM
    0.32 cannot start one where Numba is loaded (its scan for Triton kernels stumbles over
    llvmlite's library object).
    """
    if find_spec("numba") is None:
        return
    CompiledCpu.enabled = True
    if not wants_compiled(torch.empty(0, dtype=dtype)):
        return
    digest = torch.zeros(1, 1, 2, 64, dtype=dtype)
    for pages in (1, 1 << 15):
        counts = torch.full((1,), pages, dtype=torch.int32)
        table = torch.zeros(1, pages, dtype=torch.int32)
        scores = page_bound(torch.zeros(1, 1, 64, dtype=dtype), digest, table, counts)
        chosen, taken = page_select(scores, counts, torch.ones_like(counts), 1)
        virtual_heads(table, chosen, taken, counts, 1, 1, 1)
        update_page_digest(
            digest, torch.zeros(pages, 1, 64, dtype=dtype), torch.zeros(pages).long(), 1
        )
        warm_up_tokens(dtype, table, pages)


def warm_up_tokens(dtype: torch.dtype, table: torch.Tensor, pages: int) -> None:
    """The same for a choice of tokens, over as many pages of the first one."""
    S, D, bits = 8, 64, 2
    lengths = torch.full((1,), pages * S + 1, dtype=torch.int32)
    counts = lengths // S
    keys = torch.zeros(1, S, 1, D, dtype=dtype)
    codes = torch.zeros(1, 1, code_rows(S, bits, dtype.itemsize), D, dtype=dtype)
    query = torch.zeros(1, 1, D, dtype=dtype)
    update_key_codes(codes, keys, torch.zeros(pages * S, dtype=torch.int64), bits)
    logits = code_logits(query, codes, table, counts, S, bits)
    chosen, taken = token_select(logits, 1, lengths, S, lengths, pages * S + 1, 1.0)
    wider = torch.nn.functional.pad(table, (0, 1))
    sparse_decode(query, keys, keys, wider, chosen, taken, lengths, 1.0, unit=1)
