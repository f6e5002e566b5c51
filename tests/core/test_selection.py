"""Choosing pages with policies as a third party would use them: public names only."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug import Selector, choose_units, parse

S = 16


@dataclass
class Cache:
    """Random keys of a few requests in shuffled pages, their digests written chunk by chunk."""

    keys: torch.Tensor  # [N, S, H, D]; NaN where nothing was written
    digest: torch.Tensor  # [N, H, rows, D]
    table: torch.Tensor  # [B, P], ids of no page beyond a request's own
    lengths: list[int]

    @property
    def pages(self) -> torch.Tensor:
        return torch.tensor([-(-length // S) for length in self.lengths], dtype=torch.int32)

    def request(self, b: int) -> torch.Tensor:
        """Keys of a request. -> [T, H, D]"""
        pages = self.table[b, : self.pages[b]].long()
        return self.keys[pages].flatten(0, 1)[: self.lengths[b]]


def cache_of(lengths, digest, H=2, D=8, chunk=None, seed=0) -> Cache:
    torch.manual_seed(seed)
    rows = digest.rows(S, 4)
    counts = [-(-length // S) for length in lengths]
    N, P = sum(counts) + 2, max(counts) + 2
    ids = torch.randperm(N)[: sum(counts)].split(counts)
    cache = Cache(
        keys=torch.full((N, S, H, D), float("nan")),
        digest=torch.full((N, H, rows, D), float("nan")),
        table=torch.full((len(lengths), P), N + 7, dtype=torch.int32),
        lengths=lengths,
    )
    for b, length in enumerate(lengths):
        cache.table[b, : counts[b]] = ids[b]
        keys = torch.randn(length, H, D)
        slots = ids[b].repeat_interleave(S)[:length] * S + torch.arange(length) % S
        for part in torch.arange(length).split(chunk or length):
            cache.keys.flatten(0, 1)[slots[part]] = keys[part]
            padding = slots.new_full((1,), -1)
            written = torch.cat([slots[part], padding])
            given = torch.cat([keys[part], keys[:1]])
            digest.update(cache.digest, given, written, cache.keys)
    return cache


def choose(selector, cache, query, keep, width=None):
    """Lists of logical units, by request and head."""
    lengths = torch.tensor(cache.lengths, dtype=torch.int32)
    units = (lengths + selector.unit(S) - 1) // selector.unit(S)
    keep = torch.full((len(lengths),), keep, dtype=torch.int32).minimum(units)
    chosen, counts = choose_units(
        selector,
        query,
        cache.digest if selector.digest is not None else None,
        cache.table,
        cache.pages,
        lengths,
        keep,
        page_size=S,
        width=int(keep.max()) if width is None else width,
        scale=query.shape[-1] ** -0.5,
    )
    return [
        [head[:count].tolist() for head, count in zip(heads, numbers, strict=True)]
        for heads, numbers in zip(chosen, counts.tolist(), strict=True)
    ]


def quest(**options) -> Selector:
    line = ", ".join(f"{name}={value!r}" for name, value in options.items())
    selector = parse(f"quest({line})").selector
    assert selector is not None
    return selector


lengths = st.lists(st.integers(3 * S + 1, 20 * S), min_size=1, max_size=3)
groups = st.sampled_from([1, 2, 7])


@settings(max_examples=40, deadline=None)
@given(lengths, groups, st.sampled_from([None, 1, 5, S, 37]))
def test_a_score_bounds_the_logits_of_every_key_of_its_page(lengths, G, chunk):
    selector = quest()
    cache = cache_of(lengths, selector.digest, chunk=chunk)
    query = torch.randn(len(lengths), 2, G, 8)
    scores = selector.score(query, cache.digest, cache.table, cache.pages, S)
    for b, length in enumerate(lengths):
        logits = torch.einsum("hgd,thd->hgt", query[b], cache.request(b))
        for page in range(cache.pages[b]):
            best = logits[..., page * S : min(length, (page + 1) * S)].amax((1, 2))
            assert (scores[b, :, page] >= best - 1e-5).all()
        assert (scores[b, :, cache.pages[b] :] == float("-inf")).all()


@settings(max_examples=40, deadline=None)
@given(lengths, groups, st.integers(3, 8))
def test_the_pages_that_score_highest_are_chosen_and_the_newest_always(lengths, G, keep):
    selector = quest(budget=keep * S)
    cache = cache_of(lengths, selector.digest)
    query = torch.randn(len(lengths), 2, G, 8)
    scores = selector.score(query, cache.digest, cache.table, cache.pages, S)
    for b, heads in enumerate(choose(selector, cache, query, keep)):
        newest = int(cache.pages[b]) - 1
        for h, chosen in enumerate(heads):
            best = scores[b, h, :newest].topk(min(keep, newest + 1) - 1).indices.tolist()
            assert chosen == sorted([*best, newest])


def test_the_newest_page_is_chosen_though_it_scores_lowest():
    selector = quest()
    cache = cache_of([10 * S], selector.digest)
    cache.digest[cache.table[0, 9].long()] = -100.0
    query = torch.full((1, 2, 1, 8), 1.0)
    for chosen in choose(selector, cache, query, keep=3)[0]:
        assert len(chosen) == 3
        assert chosen[-1] == 9


@settings(max_examples=20, deadline=None)
@given(lengths, st.sampled_from([None, 1.0]))
def test_the_whole_cache_as_budget_chooses_every_page(lengths, top_p):
    selector = quest(top_p=top_p)
    cache = cache_of(lengths, selector.digest)
    query = torch.randn(len(lengths), 2, 2, 8)
    for b, heads in enumerate(choose(selector, cache, query, keep=1000)):
        for chosen in heads:
            if top_p is None:
                assert chosen == list(range(cache.pages[b]))
            else:  # what is left out is below the rounding of a sum in fp32
                assert len(chosen) >= 3


@settings(max_examples=60, deadline=None)
@given(
    lengths, groups, st.floats(0.05, 0.99), st.integers(3, 30), st.sampled_from([1.0, 4.0, 20.0])
)
def test_a_selection_by_mass_stops_as_soon_as_the_mass_is_reached(lengths, G, top_p, keep, peaked):
    selector = quest(top_p=top_p)
    cache = cache_of(lengths, selector.digest)
    query = torch.randn(len(lengths), 2, G, 8) * peaked
    scores = selector.score(query, cache.digest, cache.table, cache.pages, S) * 8**-0.5
    for b, heads in enumerate(choose(selector, cache, query, keep)):
        pages = int(cache.pages[b])
        for h, chosen in enumerate(heads):
            mass = scores[b, h, :pages].double().softmax(0)
            assert chosen[-1] == pages - 1
            assert min(3, pages) <= len(chosen) <= min(keep, pages)
            if len(chosen) < min(keep, pages):
                assert mass[chosen].sum() >= top_p - 1e-5
            if len(chosen) > 3:
                least = min(chosen[:-1], key=lambda page: mass[page])
                assert mass[chosen].sum() - mass[least] < top_p + 1e-5


@pytest.mark.parametrize("width", [1, 2])
def test_a_selection_narrower_than_the_least_reads_what_there_is(width):
    """A short request where the shortcut is off, or a model of less than three pages."""
    selector = quest()
    cache = cache_of([width * S - 1], selector.digest)
    query = torch.randn(1, 2, 1, 8)
    assert choose(selector, cache, query, keep=3, width=width) == [[list(range(width))] * 2]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_digest_of_eight_bits_chooses_what_its_numbers_say(dtype):
    selector = quest(dense_layers=0)
    cache = cache_of([9 * S + 3, 70], selector.digest)
    query = torch.randn(2, 2, 3, 8)
    cache.digest = cache.digest.to(dtype)
    small = choose(selector, cache, query, keep=4)
    cache.digest = cache.digest.float()
    assert small == choose(selector, cache, query, keep=4)


def test_heads_choose_for_themselves_and_their_group_together():
    selector = quest()
    cache = cache_of([12 * S], selector.digest, H=2, D=8)
    cache.digest[:] = 0.0
    table = cache.table[0].long()
    cache.digest[table[2], 0, :, 0] = 5.0  # head 0 has its best page at 2
    cache.digest[table[7], 1, :, 0] = 5.0  # head 1 at 7
    query = torch.zeros(1, 2, 3, 8)
    query[0, [0, 1], [1, 2], 0] = 1.0  # one query head of each group asks
    first, second = choose(selector, cache, query, keep=3)[0]
    assert 2 in first
    assert 2 not in second or second[:2] == [0, 2]
    assert 7 in second
    assert 7 not in first


@dataclass(frozen=True, kw_only=True)
class Lottery(Selector):
    """A third party's policy: pages by a hash of their number, nothing kept of the keys."""

    name = "lottery"
    reads = "budget"
    paper = "none"

    seed: int = 7

    def score(self, query, digest, page_table, pages, page_size):
        assert digest is None
        column = torch.arange(page_table.shape[1])
        drawn = ((column + 1) * 2654435761 * self.seed % 1009).float()
        scores = drawn.expand(*query.shape[:2], -1).clone()
        return scores.masked_fill(column >= pages[:, None, None], float("-inf"))


@settings(max_examples=20, deadline=None)
@given(lengths, st.integers(1, 20))
def test_a_selector_of_a_third_party_needs_nothing_but_a_score(lengths, budget):
    selector = Lottery(budget=budget * S)
    cache = cache_of(lengths, quest().digest)
    (keep,) = selector.units(np.array([10_000]), S).tolist()
    assert keep == budget
    query = torch.randn(len(lengths), 2, 2, 8)
    scores = selector.score(query, None, cache.table, cache.pages, S)
    for b, heads in enumerate(choose(selector, cache, query, keep)):
        newest = int(cache.pages[b]) - 1
        for chosen in heads:
            best = scores[b, 0, :newest].topk(min(keep, newest + 1) - 1).indices.tolist()
            assert chosen == sorted([*best, newest])
    assert choose(selector, cache, query, keep) == choose(selector, cache, query, keep)
    assert str(selector) == f"lottery(budget={budget * S}, seed=7)"


def test_choosing_never_touches_pages_that_are_not_the_requests_own():
    """The table beyond a request holds ids of no page; foreign digests are NaN."""
    selector = quest()
    cache = cache_of([4 * S + 3, 20 * S], selector.digest)
    written = cache.table[1, :20].long()
    others = torch.ones(len(cache.digest), dtype=torch.bool)
    others[written] = False
    query = torch.randn(2, 2, 2, 8)
    before = choose(selector, cache, query, keep=5)[1]
    cache.digest[others] = float("nan")
    assert choose(selector, cache, query, keep=5)[1] == before


def codes_of(keys: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition: a full page's keys [S, H, D] as their codes say them."""
    low, high = keys.amin(0), keys.amax(0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(keys.dtype).tiny)
    return low + ((keys - low) / step).round().clamp(0, 2**bits - 1) * step


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 12 * S), min_size=1, max_size=3),
    groups,
    st.sampled_from([1, 2, 4]),
    st.integers(1, 150),
    st.sampled_from([None, 1, 5, S, 37]),
)
def test_twilight_reads_the_tokens_that_weigh_most_by_their_codes(lengths, G, bits, budget, chunk):
    selector = parse(f"twilight(budget={budget}, bits={bits}, dense_layers=0)").selector
    cache = cache_of(lengths, selector.digest, chunk=chunk)
    query = torch.randn(len(lengths), 2, G, 8) * 3
    keep = max(budget, S + 4)
    for b, heads in enumerate(choose(selector, cache, query, keep)):
        length = lengths[b]
        full = (length - 1) // S * S
        pages = cache.request(b)[:full].split(S) if full else ()
        coded = [codes_of(page, bits) for page in pages]
        for h, chosen in enumerate(heads):
            assert len(chosen) == len(set(chosen)) == min(length, keep)
            assert chosen == sorted(chosen)
            assert set(range(full, length)) <= set(chosen), "the newest page"
            assert set(range(min(4, length))) <= set(chosen), "the first tokens"
            if not full:
                continue
            keys = torch.cat(coded)[:, h]
            weight = (query[b, h] @ keys.T * 8**-0.5).softmax(-1).mean(0)
            free = [t for t in chosen if 4 <= t < full]
            others = [t for t in range(4, full) if t not in chosen]
            if free and others:
                assert weight[free].min() >= weight[others].max() - 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(S + 1, 12 * S), st.sampled_from([0.3, 0.9, 1.0]), st.integers(S + 4, 120))
def test_twilights_mass_stops_as_soon_as_it_is_reached(length, top_p, keep):
    selector = parse(f"twilight(budget={keep}, top_p={top_p}, dense_layers=0)").selector
    cache = cache_of([length], selector.digest)
    query = torch.randn(1, 2, 2, 8) * 6
    full = (length - 1) // S * S
    coded = torch.cat([codes_of(page, 2) for page in cache.request(0)[:full].split(S)])
    for h, chosen in enumerate(choose(selector, cache, query, keep)[0]):
        weight = (query[0, h] @ coded[:, h].T * 8**-0.5).double().softmax(-1).mean(0)
        scored = [t for t in chosen if t < full]
        if len(chosen) < min(keep, length):
            assert weight[scored].sum() >= top_p - 1e-5
        free = [t for t in scored if t >= 4]
        if len(chosen) > S + 4 and free:
            least = min(free, key=lambda t: weight[t])
            assert weight[scored].sum() - weight[least] < top_p + 1e-5


def test_logits_of_many_requests_take_no_more_room_than_those_of_some(monkeypatch):
    from kvplug import selection

    selector = parse("twilight(budget=30, dense_layers=0)").selector
    cache = cache_of([7 * S + 3, 40, 3, 9 * S, 120], selector.digest)
    query = torch.randn(5, 2, 3, 8)
    whole = choose(selector, cache, query, 30)
    each = 4 * 2 * 3 * cache.table.shape[1] * S
    made, score = [], type(selector).score

    def counted(*arguments):
        made.append(score(*arguments).nbytes)
        return score(*arguments)

    monkeypatch.setattr(type(selector), "score", counted)
    for room, parts in ((2 * each, [2, 2, 1]), (1, [1] * 5)):
        made.clear()
        monkeypatch.setattr(selection, "ROOM", room)
        assert choose(selector, cache, query, 30) == whole
        assert made == [rows * each for rows in parts]
        assert 2 * max(made) <= selection.logits_bytes(5, 6, cache.table.shape[1] * S)
