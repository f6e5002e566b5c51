"""What the CUDA adapter does with a cache of plain pages, next to a real engine's on the CPU.

Every packing of the engine is also made by ``PlannedImpl.pack`` as ``cuda.py`` inherits it, in a
copy of the layer's cache whose pages lie plainly. Whatever the stock CPU kernel made of its own
must then be what the copy holds. The kernel that a GPU would run is the reference here.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.timeout(900)]


def plain_numbers(layer, kv_cache):
    """[N, H, S, 2D] of a CPU cache, keys before values, out of the stock kernel's order."""
    from kvplug_vllm import compat

    _, _, size, width = kv_cache.shape
    order = compat.cpu_page_order(layer.isa, size, width // 2, kv_cache.dtype)
    both = kv_cache.flatten(2)[..., order].unflatten(2, (2, size, width // 2))
    return both.transpose(2, 3).flatten(3)


def plain_copy(layer, kv_cache):
    """A cache of the same shape and strides, room for digests and all, but plain pages."""
    pages, page = kv_cache.shape[0], kv_cache.stride(0)
    memory = kv_cache.as_strided((pages, page), (page, 1)).clone()
    cache = memory.as_strided(kv_cache.shape, kv_cache.stride())
    cache.copy_(plain_numbers(layer, kv_cache))
    return cache


class Beside:
    """Packs every packing a second time, in plain pages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvplug_vllm import attention, cpu

        overridden = ("read_pages", "store_kept")
        inherited = {name: getattr(attention.PlannedImpl, name) for name in overridden}
        self.plain = type("Plain", (cpu.KVPlugImpl,), inherited)
        self.prompts, self.tokens, self.digests = [], 0, 0
        pack = attention.PlannedImpl.pack

        def packed_twice(impl, layer, kv_cache, packing):
            other = copy.copy(impl)
            other.__class__, other._views, other._window = self.plain, None, dict(impl._window)
            cache = plain_copy(layer, kv_cache)
            before = cache.clone()
            pack(other, layer, cache, packing)
            pack(impl, layer, kv_cache, packing)
            self.compare(impl, layer, kv_cache, cache, before, packing)

        monkeypatch.setattr(attention.PlannedImpl, "pack", packed_twice)

    def compare(self, impl, layer, kv_cache, cache, before, packing):
        from kvplug_vllm import compat

        private = packing.private.unique()
        assert torch.equal((cache != before).flatten(1).any(1).nonzero()[:, 0], private)
        equal(cache, plain_numbers(layer, kv_cache))
        if impl.digest is not None:
            tails = (
                compat.page_tail(c, *impl.offer.digest_rows(cache.shape[2], 4), impl.head_size)
                for c in (cache, kv_cache)
            )
            equal(*tails)
            self.digests += len(private)
        self.prompts.append(1)
        self.tokens += packing.width


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "policy, dtype, heads, head_dim",
    [
        (
            "snapkv(budget=128, window=40) + quest(budget=96, dense_layers=0)",
            "float32",
            (9, 3),
            96,
        ),
        ("knorm(budget=100)", "bfloat16", (4, 2), 64),
    ],
)
def test_plain_pages_hold_what_the_stock_cpu_kernels_pages_hold(
    engine, random_llama, prompts, monkeypatch, policy, dtype, heads, head_dim
):
    model = random_llama(heads=heads[0], kv_heads=heads[1], head_dim=head_dim)
    beside = Beside(monkeypatch)
    batch = prompts(300, 210, 70, 33, 161)
    with engine(
        model,
        {"policy": policy},
        dtype=dtype,
        num_gpu_blocks_override=96,
        max_model_len=1024,
        max_num_batched_tokens=1024,
    ) as planned:
        planned.generate(batch, 4)
    assert sum(beside.prompts) == 3 * 2, "three prompts longer than the budget, two layers"
    assert max(beside.prompts) == 1, "one prompt's memory at a time"
    assert beside.tokens == 3 * 2 * 128
    assert bool(beside.digests) == ("quest" in policy)


def test_pages_packed_in_tiles_are_refused_where_tokens_are_chosen(monkeypatch):
    from kvplug_vllm import compat

    order = torch.arange(2 * 32 * 64).view(2, 32, 64)
    monkeypatch.setattr(compat, "cpu_page_order", lambda *_: order.flatten())
    strides = compat.cpu_page_strides.__wrapped__("plain", 32, 64, torch.float32)
    assert strides == ((0, 64, 1), (2048, 64, 1))
    tiles = order.view(2, 32, 32, 2).transpose(1, 2).flatten()
    monkeypatch.setattr(compat, "cpu_page_order", lambda *_: tiles)
    with pytest.raises(ValueError, match=r"'amx'.*packs keys in tiles; .* with --block-size 64"):
        compat.cpu_page_strides.__wrapped__("amx", 32, 64, torch.bfloat16)
