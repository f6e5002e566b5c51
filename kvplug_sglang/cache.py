"""Where a policy meets the pool: digests beside the pages, and what leaves the pool early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvplug import Offer, digest_bytes
from kvplug_sglang import compat
from kvplug_sglang.coded_pool import CodedPool, coded_bytes
from kvplug_sglang.settings import Engine


class Digests:
    """What each page says of its keys, for every planned layer; page for page beside SGLang's
    pool."""

    def __init__(self, offer: Offer, pool: Any, page_size: int, layers: Sequence[int]) -> None:
        assert offer.digest is not None
        self.digest = offer.digest
        self.page_size = page_size
        self.place = {layer: place for place, layer in enumerate(layers)}
        pages = (pool.size + page_size) // page_size  # page 0 takes what padding writes
        parts, rows = offer.digest_rows(page_size, pool.dtype.itemsize)
        shape = (len(layers), pages, parts, pool.head_num, rows, pool.head_dim)
        every = torch.zeros(shape, dtype=pool.dtype, device=pool.device)
        self.rows = every if parts > 1 else every[:, :, 0]

    @classmethod
    def of(cls, engine: Engine, pool: Any, layers: Sequence[int]) -> Digests | None:
        """Of the planned layers; None where no request may ask for a selection that reads them."""
        if engine.offer.digest is None:
            return None
        return cls(engine.offer, pool, engine.page_size, layers)

    def of_layer(self, layer: int) -> Tensor:
        """[N, H, rows, D], or [N, K, H, rows, D] of pages that are K to a policy."""
        return self.rows[self.place[layer]]

    def update(self, layer: int, keys: Tensor, slots: Tensor) -> None:
        """keys [slots, H, D] of the pool, of which those at slots [tokens] were written."""
        rows, slots = self.of_layer(layer), slots.long()
        cached = keys[: len(rows) * self.page_size].unflatten(0, (len(rows), self.page_size))
        self.digest.update(rows, keys[slots], slots, cached)


def page_bytes(pool: Any, digests: Digests | None, page_size: int) -> int:
    """What the pool allocates for a page on this rank: all layers' keys and values, and what
    stands beside them for as long as the page is somebody's."""
    layers = compat.pool_layers(pool)
    token = sum(slot_bytes(pool, layer) for layer in layers)
    return round(page_size * token) + (0 if digests is None else digests.rows[:, 0].nbytes)


def slot_bytes(pool: Any, layer: int) -> float:
    """Of a token in one layer on this rank."""
    if isinstance(pool, CodedPool):
        return pool.slot_bytes
    return float(sum(each[0].nbytes for each in pool.get_kv_buffer(layer)))


def layer_bytes(pool: Any, digests: Digests | None, page_size: int) -> tuple[float, float]:
    """Of a token in a layer on this rank, and of its share of its page's digest."""
    token = slot_bytes(pool, compat.pool_layers(pool)[0])
    if isinstance(pool, CodedPool):  # what chooses reads the keys' codes, which the last layer has
        return token, pool.head_num * pool.layouts[-1].key_bytes / page_size
    return token, 0.0 if digests is None else digests.rows[0, 0].nbytes / page_size


def token_bytes(original: Any, self: Any, kvc: Any, num_layers: int) -> int:
    """Around ``DefaultPoolConfigurator._compute_cell_size``: a token's share of its digests, or
    of its page of codes."""
    engine = Engine.current
    if engine is not None and engine.offer.format is not None:
        return coded_bytes(kvc, num_layers)
    size: int = original(self, kvc, num_layers)
    if engine is None or engine.offer.digest is None or kvc.is_draft_worker:
        return size
    from sglang.srt.runtime_context import get_parallel

    model = kvc.model_config
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
    item = torch.empty(0, dtype=kvc.kv_cache_dtype).element_size()
    parts, rows = engine.offer.digest_rows(engine.page_size, item)
    page = digest_bytes(parts * rows, heads, model.head_dim, item)
    planned = len(set(compat.planned_layers(kvc)))
    return size + -(-page * planned // engine.page_size)
