"""Every op that touches a cache, over one of eight bits: as over the same numbers in sixteen."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kvplug_kernels.code_layout import code_rows, packed
from kvplug_kernels.code_logits import code_logits
from kvplug_kernels.code_logits import reference as logits_reference
from kvplug_kernels.dispatch import CompiledCpu, interpreted
from kvplug_kernels.fp8 import BITS, FP8, bits, widened
from kvplug_kernels.key_codes import reference as codes_reference
from kvplug_kernels.key_codes import update_key_codes
from kvplug_kernels.pack_tokens import pack_tokens
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_bound import reference as bound_reference
from kvplug_kernels.page_digest import update_page_digest
from kvplug_kernels.sparse_decode import reference as attention_reference
from kvplug_kernels.sparse_decode import sparse_decode
from tests.kernels.coded_cache import coded_cache, empty_cache
from tests.kernels.paged_cache import paged_cache, random_query
from tests.kernels.test_sparse_decode import some_tokens

COMPILED = pytest.param(
    "compiled", marks=pytest.mark.skipif(find_spec("numba") is None, reason="no Numba here")
)


@pytest.fixture(params=["kernel", "reference", COMPILED])
def where(request, monkeypatch) -> str:
    """The device on which an op takes one of its implementations."""
    if request.param == "kernel":
        return request.getfixturevalue("device")
    if interpreted():
        pytest.skip("TRITON_INTERPRET=1 runs kernels on the CPU, and nothing else")
    monkeypatch.setattr(CompiledCpu, "enabled", request.param == "compiled")
    return "cpu"


@pytest.fixture(params=FP8, ids=lambda dtype: str(dtype).removeprefix("torch."))
def cached(request) -> torch.dtype:
    return request.param


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """All that are finite, in fp32."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[every.isfinite()]


def test_sixteen_bits_hold_each_of_them(cached):
    every = torch.arange(256, dtype=torch.uint8).view(cached)
    assert torch.equal(widened(every).float().nan_to_num(1e5), every.float().nan_to_num(1e5))
    assert bits(every).dtype == BITS[cached]
    assert bits(every.float()).dtype == torch.float32


def test_every_number_is_read_and_written_as_it_is(where, cached):
    """A page of one token is its least and greatest key, and its value what attention gives."""
    every = numbers(cached)
    D, H = 64, 1
    rows = every.repeat(2)[: -(-len(every) // D) * D].view(-1, H, D).to(where, cached)
    slots = torch.arange(len(rows), device=where)
    digest = torch.full((len(rows), H, 2, D), 7.0, device=where).to(cached)
    update_page_digest(digest, rows, slots, 1)
    for row in digest.float().unbind(2):
        assert torch.equal(row, rows.float())

    one = torch.ones(len(rows), H, 1, dtype=torch.int32, device=where)
    out = sparse_decode(
        torch.zeros(len(rows), H, D, device=where), rows[:, None], rows[:, None],
        slots.int()[:, None], 0 * one, one[:, :, 0], one[:, 0, 0].contiguous(), 1.0,
    )  # fmt: skip
    assert torch.equal(out, rows.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds(where, cached, dtype):
    if interpreted() and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    cache = paged_cache([33 * 4 - 1, 5, 0], H=2, D=24, S=4, dtype=cached, device=where)
    query = random_query(cache, 3, dtype)
    rest = (cache.page_table, cache.pages)
    for levels in (None, 3):
        digest = cache.digest
        if levels:  # steps are positive
            digest = torch.stack([digest[:, :, 0], digest[:, :, 1].float().abs().to(cached)], 2)
        torch.testing.assert_close(
            page_bound(query, digest, *rest, levels),
            bound_reference.page_bound_plain(query, digest.float(), *rest, levels),
            atol=2e-1 if dtype is torch.bfloat16 else 1e-3,
            rtol=1e-2 if dtype is torch.bfloat16 else 1e-4,
        )


def test_digests_in_chunks(where, cached):
    """Token by token and many at once, with padding, from a slice of a projection."""
    torch.manual_seed(0)
    keys = torch.randn(40, 5, 24, device=where).mul(3).to(cached)[:, 1:4]
    slots = torch.tensor([*range(4, 23), -1, *range(23, 43)], device=where)
    got = torch.full((12, 3, 2, 24), float("nan"), dtype=cached, device=where)
    expected = torch.full((12, 3, 2, 24), float("nan"))
    at = 0
    for part in slots.split([1, 1, 17, 3, 18]):
        rows = keys[at : at + len(part)]
        update_page_digest(got, rows, part, 4)
        for slot, key in zip(part.tolist(), rows.cpu().float(), strict=True):
            if slot >= 0:
                low, high = (key, key) if slot % 4 == 0 else expected[slot // 4].unbind(1)
                expected[slot // 4] = torch.stack([low.minimum(key), high.maximum(key)], 1)
        at += len(part)
    assert torch.equal(got.cpu().float().nan_to_num(1e5), expected.nan_to_num(1e5))


@pytest.mark.parametrize("S, count, reach", [(32, 2, 1.0), (16, 1, 2000.0), (6, 4, 1e-3)])
@pytest.mark.parametrize("across", [False, True])
def test_codes(where, cached, S, count, reach, across):
    """Spans that no number of so few bits covers, and such as the least one covers, too."""
    torch.manual_seed(0)
    keys, _, codes = empty_cache(5, 2, 24, S, count, cached, where, across)
    limit = torch.finfo(cached).max
    drawn = (torch.randn(5, S, 2, 24) * reach).clamp(-limit, limit)
    drawn[:, 0, :, :3], drawn[:, 1, :, :3] = -limit, limit
    keys.copy_(drawn)
    expected = codes.clone()
    slots = torch.tensor([-1, S - 1, 2 * S + 3, 4 * S - 1, -S - 1], device=where)
    update_key_codes(codes, keys, slots, count)
    codes_reference.update_key_codes(expected, keys, slots, count)
    for page in (0, 3):
        assert torch.equal(codes[page, :, :2].float(), expected[page, :, :2].float())
        assert torch.equal(packed(codes, S, count)[page], packed(expected, S, count)[page])
        lo, step = codes[page, :, :2].float().unbind(1)
        least, most = keys[page].float().aminmax(dim=0)
        assert torch.equal(lo, least)
        covered = lo + (2**count - 1) * step
        assert (covered >= most)[step < limit].all()
    assert codes[1].isnan().all()


def test_logits_of_codes_and_attention_over_chosen_tokens(where, cached):
    S, H, G, count = 16, 2, 3, 2
    cache = coded_cache([17 * S + 3, 0, S, 40], H, 64, S, count, cached, where)
    assert cache.codes.shape[2] == code_rows(S, count, 1) == 6
    query = random_query(cache, G, torch.float32)
    inputs = (cache.page_table, cache.full, S, count)
    wide = torch.full((*cache.codes.shape[:2], code_rows(S, count, 4), 64), 0.0, device=where)
    wide[:, :, :2] = cache.codes[:, :, :2].float()
    packed(wide, S, count).copy_(packed(cache.codes, S, count))
    torch.testing.assert_close(
        code_logits(query, cache.codes, *inputs),
        logits_reference.code_logits(query, wide, *inputs),
        atol=1e-3,
        rtol=1e-4,
    )
    chosen, counts = some_tokens(cache, K=70)
    for pool in (cache.keys, cache.values):
        pool.copy_(pool.float().nan_to_num(0.0))  # masked_fill knows no such numbers
    keys, values = cache.keys.float(), cache.values.float()
    choice = (cache.page_table, chosen, counts, cache.lengths, 0.2, 1)
    for sinks in (None, torch.linspace(-3, 3, H * G, device=where)):
        torch.testing.assert_close(
            sparse_decode(query, cache.keys, cache.values, *choice, sinks),
            attention_reference.sparse_decode(query, keys, values, *choice, sinks),
            atol=1e-4,
            rtol=1e-4,
        )


def test_packed_tokens_are_the_same_bytes(where, cached):
    if where == "cpu" and CompiledCpu.enabled:
        pytest.skip("nothing of it is compiled")
    torch.manual_seed(0)
    cache = torch.randn(9, 2, 4, 12, device=where).to(cached)
    before = bits(cache).clone()
    pages = torch.tensor([[3, 1, 6]], device=where)
    tokens = torch.tensor([[[0, 5, 10, 11], [2, 3, 4, 9]]], device=where)
    pack_tokens(cache, pages, tokens, torch.tensor([4], device=where), pages[:, :1] * 0 + 8)
    for h in range(2):
        for k, t in enumerate(tokens[0, h].tolist()):
            source = before[pages[0, t // 4], h, t % 4]
            assert torch.equal(bits(cache)[8, h, k], source)
    assert torch.equal(bits(cache)[:8], before[:8])


def test_two_dtypes_of_a_cache_say_what_was_wanted():
    cache = paged_cache([5], 1, 16, 4, torch.float8_e5m2)
    query = random_query(cache, 1, torch.float32)
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="values must be float8_e5m2, got float32"):
        sparse_decode(
            query, cache.keys, cache.values.float(), cache.page_table, one, one[0], cache.lengths,
            1.0,
        )  # fmt: skip
