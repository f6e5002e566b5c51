"""SGLang's pool where pages are kept in a format: its slots and pages, which hold codes.

The page that a request is filling lies in an arena beside the pool, one for each request that may
run: a request's row of SGLang's table is its place in it. Nobody else reads it, and once it is
full it is coded, so that what SGLang's tree shares is whole, coded pages alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch import Tensor

from kvplug_sglang.settings import Engine


class CodedPool(MHATokenToKVPool):
    codes: list[Tensor]
    """Of each layer [pages, H, page_bytes] uint8; page 0 takes what padding writes"""

    def _create_buffers(self) -> None:
        format = Engine.serving().offer.format
        assert format is not None
        if self.post_capture_active:
            raise ValueError(
                f"kvplug: {format} allocates its pages at once, and SGLang would back the pool's "
                "memory after it captured graphs; set SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=0"
            )
        self.layouts = format.layouts(
            self.layer_num, self.page_size, self.head_dim, self.store_dtype
        )
        shape = (self.size // self.page_size + 1, self.head_num)
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.codes = [
                torch.zeros(*shape, layout.page_bytes, dtype=torch.uint8, device=self.device)
                for layout in self.layouts
            ]
        self.k_buffer: list[Tensor] = []
        self.v_buffer: list[Tensor] = []
        self.dtype = torch.uint8  # SGLang fuses writes into RoPE for a pool of bfloat16

    def _clear_buffers(self) -> None:
        del self.codes

    def get_kv_size_bytes(self) -> tuple[int, int]:
        pages = self.codes[0][..., 0].numel()
        keys, values = (
            sum(getattr(layout, f"{name}_bytes") for layout in self.layouts)
            for name in ("key", "value")
        )
        return pages * keys, pages * values

    @property
    def slot_bytes(self) -> float:
        """Of a token's share of its page in one layer, in the mean."""
        of_pages = sum(layout.page_bytes for layout in self.layouts)
        return self.head_num * of_pages / self.layer_num / self.page_size

    def get_key_buffer(self, layer_id: int) -> Tensor:
        """The shape of plain keys, without memory: SGLang asks how long they are."""
        slots = self.size + self.page_size
        return torch.empty(slots, self.head_num, self.head_dim, device="meta")

    get_value_buffer = get_key_buffer

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("pages of codes are written by the layers that know their open pages")


def open_pages(pool: CodedPool, rows: int) -> Tensor:
    """The arena: [layers, rows, S, 2, H, D], keys before values."""
    layout = pool.layouts[0]
    shape = (pool.layer_num, rows, layout.page_size, 2, pool.head_num, layout.head_size)
    return torch.zeros(shape, dtype=layout.dtype, device=pool.device)


def pool_class(original: Any, self: Any, *, kind: str, default: type) -> type:
    """Around ``KVCacheConfigurator._resolve_kv_pool_class``."""
    found: type = original(self, kind=kind, default=default)
    format = Engine.serving().offer.format
    if format is None or kind != "mha":
        return found
    if found is not MHATokenToKVPool:
        raise ValueError(
            f"kvplug: {format} takes the place of SGLang's own pool, and here it would be "
            f"{found.__name__}; leave {format.name} out"
        )
    return CodedPool


def coded_bytes(kvc: Any, layers: int) -> int:
    """Bytes of a token's share of its pages in so many layers on this rank, rounded up; what the
    arena takes is noted for ``less_open_pages``."""
    from sglang.srt.runtime_context import get_parallel, get_schedule

    engine, model = Engine.serving(), kvc.model_config
    format = engine.offer.format
    assert format is not None
    layouts = format.layouts(layers, engine.page_size, model.head_dim, kvc.kv_cache_dtype)
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
    rows = get_schedule().max_running_requests + 1  # SGLang's table has one for padding
    engine.open_bytes = rows * heads * sum(layout.plain_bytes for layout in layouts)
    return -(-heads * sum(layout.page_bytes for layout in layouts) // engine.page_size)


def less_open_pages(original: Any, self: Any, available_bytes: int, page_size: int) -> Any:
    """Around ``DefaultPoolConfigurator.calculate_pool_sizes``."""
    engine = Engine.serving()
    if engine.open_bytes >= available_bytes > 0:
        raise ValueError(
            f"kvplug: under {engine.offer.format} each request that runs fills a page in full "
            f"precision, together {engine.open_bytes / 2**30:.2f} GiB, and the cache has "
            f"{available_bytes / 2**30:.2f} GiB; write a smaller --max-running-requests"
        )
    return original(self, available_bytes - engine.open_bytes, page_size)
