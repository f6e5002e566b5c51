"""Plain torch; right for any order of slots, provided that a slot occurs once."""

import torch
from torch import Tensor

from kvplug_kernels.fp8 import widened
from kvplug_kernels.shapes import by_page


def update_page_digest(digest: Tensor, keys: Tensor, slots: Tensor, page_size: int) -> None:
    digest, written = by_page(digest), slots >= 0
    K = digest.shape[1]
    keys = widened(keys[: slots.shape[0]])
    if not written.all():
        keys, slots = keys[written], slots[written]
    if not slots.numel():
        return
    pages, offsets = slots // page_size, slots % page_size
    if len(set(pages.tolist())) == len(slots):  # decoding: half the time of the general way
        begins = (offsets == 0)[:, None, None, None]
        new = torch.where(begins, keys[:, :, None], widened(digest[pages // K, pages % K]))
        new[:, :, 0].clamp_(max=keys)
        new[:, :, 1].clamp_(min=keys)
        digest[pages // K, pages % K] = new.to(digest.dtype)
        return
    pages, owner = torch.unique(pages, return_inverse=True)
    started = torch.zeros(len(pages), dtype=torch.bool, device=digest.device)
    started[owner[offsets == 0]] = True
    low, high = extremes(keys, owner, offsets, len(pages), page_size)
    old = widened(digest[pages // K, pages % K])
    started = started[:, None, None]
    new = torch.stack(
        [
            torch.where(started, low, torch.minimum(low, old[:, :, 0])),
            torch.where(started, high, torch.maximum(high, old[:, :, 1])),
        ],
        dim=2,
    )
    digest[pages // K, pages % K] = new.to(digest.dtype)


def extremes(
    keys: Tensor, owner: Tensor, offsets: Tensor, pages: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """keys [T, H, D] of pages owner [T] -> min and max, each [pages, H, D]."""
    tokens = torch.arange(len(owner), device=keys.device)
    some = torch.empty(pages, dtype=torch.int64, device=keys.device)
    some[owner] = tokens
    grid = some[:, None].repeat(1, page_size)  # offsets that did not arrive repeat one that did
    grid[owner, offsets] = tokens
    rows = keys[grid]  # [pages, S, H, D]
    return rows.amin(1), rows.amax(1)
