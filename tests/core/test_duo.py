"""Heads of two kinds: which they are, how many pages each keeps, and where those lie."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvplug import PromptKV, keep_tokens, parse, read_offer
from kvplug.head_pages import HeadTokens, head_tables
from kvplug.heads import Shape
from kvplug.policies.duo import Duo
from kvplug.policies.keydiff import KeyDiff
from tests import heads

SHAPE = Shape(type="llama", layers=3, heads=8, kv_heads=4, head_dim=16, vocabulary=99)
LOST = {0: [0.9, 0.1, 0.8, 0.2], 1: [0.7, 0.75, 0.6, 0.65], 2: [0.0, 0.1, 0.2, 0.3]}


def saved(folder, lost=LOST, shape=SHAPE):
    heads.losing(lost, shape).save(file := folder / "heads.json")
    return str(file)


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path)


def test_the_heads_that_lose_most_without_what_is_far_retrieve(file):
    policy = parse(f"duo(keydiff(budget=1024), heads={file!r})").scored
    assert [policy.kinds(layer) for layer in range(4)] == [
        (True, False, True, False),  # .9 and .8 of six
        None,  # all four
        None,  # none
        None,  # not in the file
    ]
    fewer = replace(policy, retrieval=0.25)
    assert [fewer.kinds(layer) for layer in (0, 1)] == [
        (True, False, True, False),
        (False, True, False, False),
    ]
    assert replace(policy, retrieval=0.01).kinds(0) is None, "no head of twelve"


def test_at_equal_losses_the_first_heads_retrieve(tmp_path):
    file = saved(tmp_path, {0: [0.5, 0.5, 0.5, 0.5], 2: [0.5, 0.5, 0.5, 0.5]})
    policy = Duo(base=KeyDiff(budget=1024), heads=file, retrieval=0.75)
    assert policy.kinds(0) is None
    assert policy.kinds(2) == (True, True, False, False)


@st.composite
def layers(draw):
    kinds = tuple(draw(st.lists(st.booleans(), min_size=2, max_size=8)))
    kinds = (True, False, *kinds[2:])
    size = draw(st.sampled_from([1, 16, 32]))
    sink, recent = draw(st.integers(0, 90)), draw(st.integers(1, 200))
    budget = sink + recent + draw(st.integers(1, 700))
    return kinds, size, sink, recent, budget, draw(st.integers(1, 4000))


@given(layers())
def test_heads_keep_together_what_they_would_of_one_budget(case):
    kinds, size, sink, recent, budget, prompt = case
    policy = Duo(base=KeyDiff(budget=budget, sinks=0), heads="unread", sink=sink, recent=recent)
    H, whole = len(kinds), prompt // size
    private = min(whole, policy.pages(size))
    (pages,) = policy.head_pages(kinds, np.array([private]), np.array([whole]), size)
    retrieving, streaming = (
        {int(n) for n, kind in zip(pages, kinds, strict=True) if kind is which}
        for which in (True, False)
    )
    assert len(retrieving) == len(streaming) == 1
    (most,), (rest,) = retrieving, streaming
    assert pages.sum() <= H * private, "head pages that the private pages are"
    assert pages.max() <= whole
    if private == whole:
        assert (pages == whole).all(), "everything"
    else:
        assert most >= rest >= min(-(-(sink + recent) // size), private)
        spared = H * private - pages.sum()
        assert spared < H or rest == whole, "nothing is left that a head could keep"


def test_a_page_of_numbers():
    """Of 1,000 tokens at 512, two heads of four keep 768 and two 256."""
    policy = Duo(base=KeyDiff(budget=512), heads="unread", sink=64, recent=192)
    kinds = (False, True, True, False)
    private, whole = np.array([16, 16, 0]), np.array([31, 20, 0])
    assert policy.head_pages(kinds, private, whole, 32).tolist() == [
        [8, 24, 24, 8],
        [12, 20, 20, 12],  # all of it, and what they leave
        [0, 0, 0, 0],
    ]


def prompt_of(lengths, H=4, D=16, layer=0, size=8, seed=0):
    torch.manual_seed(seed)
    T = max(lengths)
    return PromptKV(
        keys=torch.randn(len(lengths), T, H, D), values=torch.randn(len(lengths), T, H, D),
        queries=None, lengths=torch.tensor(lengths), scale=1.0, first_head=layer * H,
        page_size=size,
    )  # fmt: skip


def test_streaming_heads_keep_their_first_and_newest_tokens_and_others_what_the_base_says(file):
    policy = Duo(base=KeyDiff(budget=64, sinks=2), heads=file, sink=8, recent=16)
    prompt, size = prompt_of([200]), 8
    kinds = policy.kinds(0)
    pages = policy.head_pages(kinds, np.array([8]), np.array([25]), size)[0]
    assert pages.tolist() == [13, 3, 13, 3]
    keep = torch.from_numpy(pages * size)[None]
    kept = keep_tokens(policy, prompt, keep, int(keep.max()))[0]
    for head, kind in enumerate(kinds):
        mine = kept[head, : keep[0, head]].tolist()
        if kind:
            n = len(mine)
            base = keep_tokens(policy.base, prompt, torch.tensor([n]), n)[0, head]
            assert mine == base.tolist()
        else:
            assert mine == [*range(8), *range(184, 200)]
    elsewhere = policy.score(prompt_of([200], layer=1))
    assert torch.equal(elsewhere, policy.base.score(prompt_of([200], layer=1)))


def test_heads_keep_of_a_batch_what_each_keeps_alone():
    prompt, keep = prompt_of([200, 90]), torch.tensor([[64, 8, 0, 72], [16, 200, 8, 24]])
    policy = KeyDiff(budget=64)
    kept = keep_tokens(policy, prompt, keep, 200)
    for b, row in enumerate(keep.tolist()):
        for head, count in enumerate(row):
            alone = keep_tokens(policy, prompt, torch.tensor([count] * 2), 200)
            assert torch.equal(kept[b, head], alone[b, head])


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 7),
)
def test_what_is_packed_head_by_head_is_found_by_the_heads_tables(pages, size, more, rest):
    H, pages = len(pages), np.array(pages)
    kept = -(-int(pages.sum()) // H) + more
    row = torch.randperm(50)[: kept + rest]
    page_stride, head_stride = 3 * H + 1, 3
    to = HeadTokens.of(pages, size)
    where = (
        (row[to.page] * page_stride + torch.from_numpy(to.place) * head_stride) * size
        + torch.from_numpy(to.offset)
    ).tolist()  # fmt: skip
    assert len(set(where)) == len(where), "no two tokens in one place"
    width = int(pages.max()) + rest + 2
    table = head_tables(
        row[None].int(), torch.tensor([kept]).int(), torch.from_numpy(pages)[None].int(), width,
        page_stride, head_stride,
    )  # fmt: skip
    assert table.shape == (H, width)
    assert table.dtype is torch.int32
    for head, count in enumerate(pages.tolist()):
        mine = [w for w, h in zip(where, to.head.tolist(), strict=True) if h == head]
        read = [
            int(table[head, token // size]) * size + token % size for token in range(count * size)
        ]
        assert mine == read
        behind = [int(page) * page_stride + head * head_stride for page in row[kept:]]
        assert table[head, count : count + rest].tolist() == behind


@pytest.mark.parametrize(
    "line, part",
    [
        ("duo(heads='f')", "duo needs base"),
        ("duo(keydiff)", "duo needs heads"),
        ("duo(quest, heads='f')", "duo wraps a policy that scores a prompt's tokens, got quest"),
        ("duo(duo(keydiff, heads='f'), heads='f')", "duo wraps a policy that scores"),
        ("pyramid(duo(keydiff, heads='f'))", "pyramid wraps a policy that scores a prompt's"),
        ("chunkkv(duo(keydiff, heads='f'))", "chunkkv wraps a policy that scores a prompt's"),
        ("duo(keydiff, heads='')", "heads must name a file that kvplug calibrate made, got ''"),
        ("duo(keydiff, heads=3)", "heads must name a file that kvplug calibrate made, got 3"),
        ("duo(keydiff, heads='f', retrieval=1)", "above 0 and below 1, got 1"),
        ("duo(keydiff, heads='f', retrieval='half')", "above 0 and below 1, got 'half'"),
        ("duo(keydiff, heads='f', recent='256')", "recent must be a number of tokens, at least 1"),
        ("duo(keydiff, heads='f', recent=True)", "at least 1, got True"),
        ("duo(keydiff, heads='f', sink=-1)", "sink must be a number of tokens, at least 0"),
        ("duo(keydiff(budget=384), heads='f')", "sink + recent = 384 tokens, which must be fewer"),
        ("duo(keydiff(interval=64), heads='f')", "pack prompts alone, at their end"),
        ("duo(keydiff(budget=.25, chunk=512), heads='f')", "leave interval and chunk out"),
        ("duo(kvzip(budget=.25, chunk=512), heads='f')", "leave interval and chunk out"),
        ("duo(keydiff, heads='f') + quest", "write duo("),
        ("duo(keydiff, heads='f') + a_shape", "never run with another policy"),
        ("duo(keydiff, heads='f') + snapkv", "both answer the stage 'compress'"),
    ],
)
def test_a_wrong_line_says_what_to_write(line, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        parse(line)


def test_the_printed_form_parses_back_and_is_what_it_wraps():
    line = (
        "duo(snapkv(budget=512, sinks=0, window=64, pool=5), heads='f', retrieval=0.25, sink=64, "
        "recent=128)"
    )
    policy = parse(line).scored
    assert str(parse(line)) == line
    assert (policy.budget, policy.sinks, policy.window) == (512, 0, 64)
    assert policy.needs_queries
    assert not policy.query_agnostic
    agnostic = parse("duo(keydiff, heads='f')").scored
    assert agnostic.query_agnostic
    assert not agnostic.needs_queries


def test_a_file_of_another_model_and_none_at_all_are_no_fit(file, tmp_path):
    class Config:
        model_type, num_hidden_layers, num_attention_heads, num_key_value_heads = "llama", 3, 8, 4
        head_dim, vocab_size = 16, 99

    line = "duo(keydiff(budget=1024), heads={!r})"
    assert not [*parse(line.format(file)).misfits(Config)]
    Config.vocab_size = 100
    (reason,) = parse(line.format(file)).misfits(Config)
    assert "was made for tiny" in reason
    assert "kvplug calibrate MODEL" in reason
    (reason,) = parse(line.format(str(tmp_path / "none"))).misfits(Config)
    assert "cannot read the file of heads" in reason


def test_it_serves_alone():
    with pytest.raises(ValueError, match="cannot share a server with other policies"):
        read_offer({"policy": "dense", "allow": ["duo"], "max_budget": 512}, environ={})
    own = "duo(keydiff, heads='f')"
    with pytest.raises(ValueError, match="cannot share a server with other policies"):
        read_offer({"policy": own, "allow": ["snapkv"]}, environ={})
