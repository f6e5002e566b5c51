"""FlashAttention 3 as vLLM's wheel brings it, to measure against: one library, without vLLM."""

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"


def library() -> Path | None:
    """Searched for on the path: to look for vLLM by name would import it."""
    found = (Path(entry or ".") / LIBRARY for entry in sys.path)
    return next((file for file in found if file.exists()), None)


def absent() -> str | None:
    """Why it cannot run here; None where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return f"FlashAttention 3 is for sm_90, this is sm_{major}{minor}"
    if library() is None:
        return f"no {LIBRARY} on the path; tools/gpu_bundle.py brings it"
    return None


@cache
def load() -> None:
    torch.ops.load_library(str(library()))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    longest: int,
    splits: int = 0,
) -> Tensor:
    """One query of each sequence over its pages, as vllm's flash_attn_interface.py calls it.

    query [B, Hq, D], keys and values [N, S, H, D] of any page and head strides, table [B, K]
    int32, lengths [B] int32 -> [B, Hq, D]. splits: 0 lets the kernel choose.
    """
    load()
    bounds = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    out = torch.empty_like(query)
    torch.ops._vllm_fa3_C.fwd(
        query, keys, values, None, None, None, out,
        bounds, None, None, None, lengths, 1, longest, table, None, None,  # lengths of keys
        None, None, None, None, None, None,  # rotation, scales of FP8
        query.shape[-1] ** -0.5, True, -1, -1, 0.0, True, None, splits, None, 0,
        None, 1, 0, None,  # sinks, context parallelism
    )  # fmt: skip
    return out


def virtual_pages(pool: Tensor) -> tuple[Tensor, int, int]:
    """pool [N, S, H, D] -> ([virtual pages, S, 1, D], page stride, head stride) as virtual_heads
    wants them: page p of head h is virtual page p * page stride + h * head stride."""
    pages, size, heads, width = pool.shape
    page, token, head, _ = pool.stride()
    assert page % width == head % width == 0
    count = ((pages - 1) * page + (heads - 1) * head) // width + 1
    view = pool.as_strided(
        (count, size, 1, width), (width, token, width, 1), pool.storage_offset()
    )
    return view, page // width, head // width


def virtual_tokens(pool: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens in pages of one: pool [N, S, H, D] and a table [B, K] of its virtual pages
    -> ([virtual tokens, 1, 1, D], [B, K * S] int32)"""
    _, size, _, width = pool.shape
    pages, _, _ = virtual_pages(pool)
    token = pool.stride(1) // width
    count = len(pages) + (size - 1) * token
    view = pool.as_strided((count, 1, 1, width), (width, width, width, 1), pool.storage_offset())
    within = torch.arange(size, dtype=torch.int32, device=table.device) * token
    return view, (table[:, :, None] + within).flatten(1)
