import pytest
import torch

from kvplug_kernels.sparse_decode import reference, sparse_decode
from kvplug_kernels.virtual_heads import reference as virtual_heads
from tests.kernels.coded_cache import coded_cache
from tests.kernels.paged_cache import paged_cache, random_query

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def every_page(cache):
    """The whole cache as a selection: chosen [B, H, P], counts [B, H]."""
    B, P = cache.page_table.shape
    H = cache.keys.shape[2]
    chosen = torch.arange(P, dtype=torch.int32, device=cache.lengths.device).expand(B, H, P)
    counts = cache.pages[:, None].expand(B, H).contiguous()
    return (chosen * (chosen < counts[:, :, None])).int(), counts


def some_pages(cache, K):
    """Every other page up to K, another half for odd heads, and the last page."""
    B, H = len(cache.lengths), cache.keys.shape[2]
    chosen, counts = torch.zeros(B, H, K).int(), torch.zeros(B, H).int()
    for b, pages in enumerate(cache.pages.tolist()):
        for h in range(H):
            picked = sorted({*range(h % 2, pages, 2)} - {pages - 1})[: K - 1]
            picked += [pages - 1] * (pages > 0)
            chosen[b, h, : len(picked)] = torch.tensor(picked)
            counts[b, h] = len(picked)
    return chosen.to(cache.lengths.device), counts.to(cache.lengths.device)


def dense(cache, query, scale):
    """Softmax attention over all cached tokens, one request after the other."""
    S, H = cache.keys.shape[1:3]
    out = torch.zeros(query.shape)
    for b, length in enumerate(cache.lengths.tolist()):
        if length:
            ids = cache.page_table[b, : -(-length // S)].long()
            k, v = (x[ids].flatten(0, 1)[:length].float() for x in (cache.keys, cache.values))
            q = query[b].float().view(H, -1, query.shape[-1])
            weights = (torch.einsum("hgd,thd->hgt", q, k) * scale).softmax(-1)
            out[b] = torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1)
    return out


@pytest.mark.parametrize("lengths", [[1], [33 * 4 - 2, 0, 8]])
def test_reference_over_all_pages_is_dense_attention(lengths):
    cache = paged_cache(lengths, H=2, D=24, S=4)
    query = random_query(cache, G=3)
    out = reference.sparse_decode(
        query, cache.keys, cache.values, cache.page_table, *every_page(cache), cache.lengths, 0.2
    )
    torch.testing.assert_close(out, dense(cache, query, 0.2))


def test_virtual_heads_over_head_major_pages_give_the_same_attention():
    """Page p of KV head h is virtual page p * H + h of a cache with a single head."""
    H, D, S, G, K = 2, 24, 4, 3, 5
    cache = paged_cache([33 * 4 - 2, 0, 8], H, D, S)
    query = random_query(cache, G)
    chosen, counts = some_pages(cache, K)
    expected = reference.sparse_decode(
        query, cache.keys, cache.values, cache.page_table, chosen, counts, cache.lengths, 0.2
    )
    table = torch.empty(3 * H, K, dtype=torch.int32)
    tokens = torch.empty(3 * H, dtype=torch.int32)
    virtual_heads.virtual_heads(
        cache.page_table, chosen, counts, cache.lengths, S, H, 1, (table, tokens)
    )
    pages = (tokens[:, None] + S - 1) // S
    every = torch.arange(K, dtype=torch.int32).repeat(3 * H, 1, 1)
    keys, values = (x.transpose(1, 2).reshape(-1, S, 1, D) for x in (cache.keys, cache.values))
    out = reference.sparse_decode(
        query.reshape(3 * H, G, D), keys, values, table, every, pages, tokens, 0.2
    )
    torch.testing.assert_close(out.view(3, H * G, D), expected)


@pytest.mark.parametrize(
    "lengths, H, G, D, S",
    [
        ([1], 1, 1, 64, 16),
        ([33 * 4 - 1, 0], 2, 7, 96, 4),
        ([70, 16], 1, 8, 80, 16),
        ([300], 1, 3, 32, 24),
    ],
)
def test_kernel_equals_reference(lengths, H, G, D, S, dtype, device, poisoned_outputs):
    cache = paged_cache(lengths, H, D, S, dtype, device)
    chosen, counts = some_pages(cache, K=20)
    unread = torch.ones(len(cache.keys), dtype=torch.bool)
    for b in range(len(lengths)):
        for h in range(H):
            unread[cache.page_table[b, chosen[b, h, : counts[b, h]].long()].long()] = False
    cache.keys[unread], cache.values[unread] = float("nan"), float("nan")
    query = random_query(cache, G)
    inputs = (query, cache.keys, cache.values, cache.page_table, chosen, counts, cache.lengths)
    sinks = torch.linspace(-30, 90, H * G, device=device).to(dtype)  # of no weight, and of all
    for beside, cap in ((None, 0.0), (sinks, 0.0), (sinks, 3.0)):
        torch.testing.assert_close(
            sparse_decode(*inputs, 0.2, sinks=beside, cap=cap),
            reference.sparse_decode(*inputs, 0.2, sinks=beside, cap=cap),
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
        )


def test_a_sink_is_a_token_without_a_value():
    cache = paged_cache([70, 0, 16], H=2, D=32, S=16)
    query, sinks = random_query(cache, G=3), torch.randn(6) * 3
    inputs = (query, cache.keys, cache.values, cache.page_table, *every_page(cache))
    out = reference.sparse_decode(*inputs, cache.lengths, 0.2, sinks=sinks)
    plain = dense(cache, query, 0.2)
    for b, length in enumerate(cache.lengths.tolist()):
        ids = cache.page_table[b, : -(-length // 16)].long()
        keys = cache.keys[ids].flatten(0, 1)[:length]
        logits = torch.einsum("hgd,thd->hgt", query[b].view(2, 3, 32), keys).flatten(0, 1) * 0.2
        mass = logits.exp().sum(1)
        kept = mass / (mass + sinks.exp())
        torch.testing.assert_close(out[b], plain[b] * kept[:, None])


def test_a_cap_bounds_the_logits():
    cache = paged_cache([70, 0, 16], H=2, D=32, S=16)
    query = random_query(cache, G=3)
    inputs = (query, cache.keys, cache.values, cache.page_table, *every_page(cache))
    out = reference.sparse_decode(*inputs, cache.lengths, 2.0, cap=1.5)
    ids = cache.page_table[0, :5].long()
    keys, values = (x[ids].flatten(0, 1)[:70] for x in (cache.keys, cache.values))
    logits = torch.einsum("hgd,thd->hgt", query[0].view(2, 3, 32), keys) * 2.0
    weights = (1.5 * torch.tanh(logits / 1.5)).softmax(-1)
    expected = torch.einsum("hgt,thd->hgd", weights, values).flatten(0, 1)
    torch.testing.assert_close(out[0], expected)


def as_units(cache, chosen, counts, unit):
    """The same pages named by their units."""
    S = cache.keys.shape[1]
    each = chosen[..., None] * (S // unit) + torch.arange(S // unit)
    filled = ((cache.lengths - 1) % S // unit + 1)[:, None]  # units of the last page
    named = ((counts - 1) * (S // unit) + filled).masked_fill(counts == 0, 0)
    return each.flatten(2).int(), named.int()


def some_tokens(cache, K):
    """Up to K tokens of each head, the last one among them, unevenly spread over pages."""
    B, H = len(cache.lengths), cache.keys.shape[2]
    chosen, counts = torch.zeros(B, H, K).int(), torch.zeros(B, H).int()
    for b, length in enumerate(cache.lengths.tolist()):
        for h in range(H):
            drawn = torch.randperm(max(length - 1, 0))[: K - 1 - h].tolist()
            picked = sorted([*drawn, length - 1]) if length else []
            chosen[b, h, : len(picked)] = torch.tensor(picked)
            counts[b, h] = len(picked)
    return chosen.to(cache.lengths.device), counts.to(cache.lengths.device)


def poison_unread(cache, chosen, counts):
    """NaN in every key and value of a token that its head did not choose."""
    S, H = cache.keys.shape[1:3]
    read = torch.zeros(len(cache.keys), S, H, dtype=torch.bool)
    for b in range(len(cache.lengths)):
        for h in range(H):
            tokens = chosen[b, h, : counts[b, h]].long()
            read[cache.page_table[b, tokens // S].long(), tokens % S, h] = True
    for pool in (cache.keys, cache.values):
        pool.masked_fill_(~read.to(pool.device)[..., None], float("nan"))


@pytest.mark.parametrize("unit", [1, 2])
def test_reference_reads_units_as_their_pages(unit):
    cache = paged_cache([33 * 4 - 1, 0, 8], H=2, D=24, S=4)
    query = random_query(cache, G=3)
    pages = some_pages(cache, K=9)
    inputs = (query, cache.keys, cache.values, cache.page_table)
    expected = reference.sparse_decode(*inputs, *pages, cache.lengths, 0.2)
    units = as_units(cache, *pages, unit)
    got = reference.sparse_decode(*inputs, *units, cache.lengths, 0.2, unit)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "lengths, H, G, D, S",
    [([1], 1, 1, 64, 16), ([200, 0, 33], 2, 7, 96, 16), ([300], 1, 4, 80, 32)],
)
@pytest.mark.parametrize("across", [False, True])
def test_kernel_reads_chosen_tokens(lengths, H, G, D, S, across, dtype, device, poisoned_outputs):
    """Where keys lie as [D, S] too; a token that was not chosen is NaN."""
    cache = coded_cache(lengths, H, D, S, 2, dtype, device, across)
    chosen, counts = some_tokens(cache, K=70)
    poison_unread(cache, chosen, counts)
    query = random_query(cache, G)
    inputs = (query, cache.keys, cache.values, cache.page_table, chosen, counts, cache.lengths)
    torch.testing.assert_close(
        sparse_decode(*inputs, 0.2, unit=1),
        reference.sparse_decode(*inputs, 0.2, 1),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


def test_wrong_unit_says_what_it_wanted():
    cache = paged_cache([5], 1, 16, 4)
    inputs = (random_query(cache, 1), cache.keys, cache.values, cache.page_table)
    with pytest.raises(ValueError, match="unit must divide the 4 tokens of a page, got 3"):
        sparse_decode(*inputs, *every_page(cache), cache.lengths, 1.0, unit=3)


@pytest.mark.gpu
def test_kernel_over_all_pages_is_dense_attention_at_size():
    cache = paged_cache([2000, 1777], 8, 128, 16, torch.bfloat16, "cuda")
    query = random_query(cache, 4)
    selection = every_page(cache)
    out = sparse_decode(
        query, cache.keys, cache.values, cache.page_table, *selection, cache.lengths, 0.09
    )
    torch.testing.assert_close(out.cpu().float(), dense(cache, query, 0.09), rtol=2e-2, atol=2e-2)


def test_wrong_dtype_says_what_it_wanted():
    cache = paged_cache([5], 1, 16, 4)
    query = torch.zeros(1, 2, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"keys must be float16 or float8_.*, got float32"):
        sparse_decode(
            query, cache.keys, cache.values, cache.page_table, *every_page(cache), cache.lengths, 1
        )
