"""What the references promise, on shapes and values that Hypothesis draws."""

from itertools import pairwise

import pytest
import torch

from kvplug_kernels.code_layout import BITS
from kvplug_kernels.pack_tokens import reference as pack_tokens
from kvplug_kernels.page_digest import reference as page_digest
from kvplug_kernels.page_select import reference as page_select
from kvplug_kernels.token_select import reference as token_select
from tests.kernels.test_coded_decode import by_reference
from tests.kernels.test_coded_decode import check as check_codes
from tests.kernels.test_pack_tokens import check as check_packing
from tests.kernels.test_pack_tokens import job
from tests.kernels.test_page_select import check
from tests.kernels.test_token_select import check as check_tokens

pytest.importorskip("hypothesis", reason="Hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

S, H = 4, 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_digest_is_min_and_max_of_the_page_however_its_tokens_arrive(data):
    """Every chunk may also be shuffled and padded."""
    length = data.draw(st.integers(1, 21))
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=5))})
    seed = torch.Generator().manual_seed(length)
    keys = torch.randn(length, H, 8, generator=seed)
    table = torch.randperm(8, generator=seed)
    slots = table[torch.arange(length) // S] * S + torch.arange(length) % S
    digest = torch.full((8, H, 2, 8), float("nan"))
    for start, stop in pairwise(cuts):
        order = torch.tensor(data.draw(st.permutations(range(start, stop))))
        chunk = torch.cat([torch.tensor([-1]), slots[order], torch.tensor([-7])])
        chunk_keys = torch.nn.functional.pad(keys[order], (0, 0, 0, 0, 1, 3), value=float("nan"))
        page_digest.update_page_digest(digest, chunk_keys, chunk, S)
    for p in range(-(-length // S)):
        page = keys[p * S : (p + 1) * S]
        assert torch.equal(digest[table[p]], torch.stack([page.amin(0), page.amax(0)], 1))
    unused = table[-(-length // S) :]
    assert digest[unused].isnan().all()


@st.composite
def problems(draw):
    """Few distinct scores, so that ties abound; no sum of shares comes near a top_p."""
    B, H, P = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 17))
    width = draw(st.integers(1, P + 2))
    levels = st.sampled_from([-3.0, -0.0, 0.0, 0.5, 2.0, 7.0])
    scores = draw(st.lists(levels, min_size=B * H * P, max_size=B * H * P))
    counts = st.lists(st.integers(0, P), min_size=B, max_size=B)
    return (
        torch.tensor(scores).view(B, H, P),
        torch.tensor(draw(counts), dtype=torch.int32),
        torch.tensor(draw(counts), dtype=torch.int32),
        width,
        draw(st.sampled_from([None, 0.1237, 0.5003, 0.8991, 0.9903])),
        draw(st.integers(1, width)),
        draw(st.sampled_from([0, 1, 3, 20])),
        draw(st.none() | counts.map(lambda each: torch.tensor(each, dtype=torch.int32))),
    )


@settings(max_examples=300, deadline=None)
@given(problems())
def test_selection_equals_sorting(problem):
    *scored, sinks, newest = problem
    check(*scored, *page_select.page_select(*problem), sinks, newest)


@st.composite
def token_problems(draw):
    """Few distinct logits in pages of a few tokens, what is not scored NaN."""
    B, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    size, sinks, T = draw(st.integers(1, 4)), draw(st.integers(0, 5)), 20
    levels = st.sampled_from([float("-inf"), -3.0, 0.0, 0.5, 2.0, 7.0])
    logits = draw(st.lists(levels, min_size=B * heads * group * T, max_size=B * heads * group * T))
    logits = torch.tensor(logits).view(B, heads * group, T)
    counts = st.lists(st.integers(0, T), min_size=B, max_size=B)
    lengths, keep = (torch.tensor(draw(counts), dtype=torch.int32) for _ in range(2))
    for row, length in zip(logits, lengths.tolist(), strict=True):
        row[:, max(length - 1, 0) // size * size :] = float("nan")
    width = draw(st.integers(size + sinks, T + 9))
    top_p = draw(st.sampled_from([None, 0.1237, 0.5003, 0.8991, 0.9903]))
    return logits, heads, lengths, size, keep, width, 0.7, top_p, sinks


@settings(max_examples=200, deadline=None)
@given(token_problems())
def test_choice_of_tokens_equals_sorting(problem):
    check_tokens(*problem, *token_select.token_select(*problem))


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(0, 50), max_size=4))
    prompts = [(length, draw(st.integers(0, length))) for length in lengths]
    H, C, size = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 17))
    return job(prompts, H, C, size, flat=draw(st.booleans()))


@settings(max_examples=100, deadline=None)
@given(packings())
def test_packing_copies_what_is_kept_and_nothing_else(packing):
    check_packing(pack_tokens.pack_tokens, packing)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_coded_pages_are_read_as_they_are_decoded(data):
    """Any bits of keys and of values, pages, heads and lengths that the layout can hold."""
    size, D = data.draw(st.sampled_from([8, 16, 24, 40])), data.draw(st.sampled_from([8, 24, 64]))
    lengths = data.draw(st.lists(st.integers(0, 5 * size), min_size=1, max_size=3))
    heads, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 3, 4, 8]))
    bits = (data.draw(st.sampled_from(BITS)) for _ in range(2))
    check_codes(lengths, heads, group, D, size, *bits, torch.float32, decode=by_reference)
