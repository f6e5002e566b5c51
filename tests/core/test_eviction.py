"""Scored eviction: each score against its definition, the kept sets against what they promise."""

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug import (
    Composition,
    Evidence,
    Observed,
    PromptKV,
    ScoredEviction,
    Sharing,
    keep_tokens,
    parse,
    window_queries,
)
from kvplug.policies import r_kv as r_kv_module
from kvplug.policies import snapkv as snapkv_module
from kvplug.policies.chunkkv import ChunkKV
from kvplug.policies.cur import CUR
from kvplug.policies.keydiff import KeyDiff
from kvplug.policies.knorm import KNorm
from kvplug.policies.lagkv import LagKV
from kvplug.policies.r_kv import RKV
from kvplug.policies.random import Random
from kvplug.policies.snapkv import SnapKV
from kvplug.policies.tova import TOVA
from kvplug.policies.vase import VaSE

KVPRESS = np.load(Path(__file__).parent / "fixtures/kvpress.npz")
NAN = float("nan")
S = 16


@dataclass(frozen=True, kw_only=True)
class Echo(ScoredEviction):
    """Takes the first channel of the values for the score."""

    name = "echo"
    evidence = Evidence.NONE
    query_agnostic = True
    paper = ""

    def score(self, prompt: PromptKV) -> torch.Tensor:
        return prompt.values[..., 0].transpose(1, 2).float()


def prompts(lengths, H=2, G=3, D=8, W=6, padding=5, page_size=S, dtype=torch.float32, seed=0):
    """Random prompts, NaN wherever a prompt has no token."""
    torch.manual_seed(seed)
    B, T = len(lengths), max(lengths) + padding
    keys, values = torch.randn(2, B, T, H, D, dtype=torch.float32).to(dtype)
    queries = torch.randn(B, W, H, G, D).to(dtype)
    for b, length in enumerate(lengths):
        keys[b, length:] = values[b, length:] = NAN
        queries[b, : max(W - length, 0)] = NAN
    return PromptKV(
        keys=keys,
        values=values,
        queries=queries,
        lengths=torch.tensor(lengths),
        scale=D**-0.5,
        page_size=page_size,
    )


def alone(prompt, b):
    """One request of a batch, without padding."""
    length = int(prompt.lengths[b])
    return replace(
        prompt,
        keys=prompt.keys[b : b + 1, :length],
        values=prompt.values[b : b + 1, :length],
        queries=None if prompt.queries is None else prompt.queries[b : b + 1],
        lengths=prompt.lengths[b : b + 1],
    )


def scored(scores, lengths, page_size):
    """A prompt whose echo is scores [B, H, T]."""
    values = torch.tensor(scores, dtype=torch.float32).transpose(1, 2)[..., None]
    return PromptKV(
        keys=torch.full_like(values, NAN),
        values=values,
        queries=None,
        lengths=torch.tensor(lengths),
        scale=1.0,
        page_size=page_size,
    )


def kept(policy, prompt, keep, protect=()):
    """Sorted positions by request and head, what does not count left out."""
    keep = torch.tensor(keep, dtype=torch.int32)
    width = int(keep.max())
    tokens = keep_tokens(policy, prompt, keep, width, protect)
    assert tokens.shape == (*prompt.keys.shape[::2][:2], width)
    assert tokens.dtype is torch.int64
    counts = keep.minimum(prompt.lengths // prompt.page_size * prompt.page_size).tolist()
    for row, count in zip(tokens, counts, strict=True):
        assert not row[:, count:].any()
    return [
        [head[:count].tolist() for head in row] for row, count in zip(tokens, counts, strict=True)
    ]


# Scores, against their definitions in doubles, one number at a time.


def slow_knorm(policy, keys, values, queries, scale):
    return [-math.sqrt(sum(x * x for x in key)) for key in keys]


def slow_keydiff(policy, keys, values, queries, scale):
    norms = [math.sqrt(sum(x * x for x in key)) for key in keys]
    mean = [
        sum(key[d] / norm for key, norm in zip(keys, norms, strict=True)) / len(keys)
        for d in range(len(keys[0]))
    ]
    length = math.sqrt(sum(x * x for x in mean))
    return [
        -sum(x * y for x, y in zip(key, mean, strict=True)) / norm / length
        for key, norm in zip(keys, norms, strict=True)
    ]


def slow_snapkv(policy, keys, values, queries, scale):
    P, W = len(keys), policy.window
    rows = range(max(0, P - W), P)  # positions of the window's queries
    G = len(queries[0])
    attention = [0.0] * P
    for i in rows:
        for query in queries[i - P + W]:
            powers = [
                math.exp(scale * sum(x * y for x, y in zip(query, key, strict=True)))
                for key in keys[: i + 1]
            ]
            for j, power in enumerate(powers):
                attention[j] += power / sum(powers) / len(rows) / G
    reach = policy.pool // 2
    before = max(P - W, 0)
    return [
        sum(attention[i] for i in range(j - reach, j + reach + 1) if 0 <= i < before) / policy.pool
        for j in range(P)
    ]


def slow_tova(policy, keys, values, queries, scale):
    attention = [0.0] * len(keys)
    for query in queries[-1]:
        powers = [
            math.exp(scale * sum(x * y for x, y in zip(query, key, strict=True))) for key in keys
        ]
        for j, power in enumerate(powers):
            attention[j] += power / sum(powers) / len(queries[-1])
    return attention


def slow_r_kv(policy, keys, values, queries, scale):
    P, W = len(keys), policy.window
    before, attention = max(P - W, 0), [0.0] * P
    for row in queries if before else []:
        logits = [
            max(scale * sum(x * y for x, y in zip(query, key, strict=True)) for query in row)
            for key in keys[:before]
        ]
        powers = [math.exp(each) for each in logits]
        for j, power in enumerate(powers):
            attention[j] += power / sum(powers) / W
    reach = policy.pool // 2
    pooled = [max(attention[max(0, j - reach) : j + reach + 1]) for j in range(P)]
    norms = [math.sqrt(sum(x * x for x in key)) for key in keys]
    means = [0.0] * P
    for i in range(P):
        like = [
            sum(x * y for x, y in zip(keys[i], keys[j], strict=True)) / norms[i] / norms[j]
            if i != j else 0.0
            for j in range(P)
        ]  # fmt: skip
        alike = [j for j in range(P) if like[j] > 0.5]
        for j in range(P):
            means[j] += like[j] / P if j not in alike[-1:] else 0
    powers = [math.exp(mean) for mean in means]
    weight = policy.attention
    return [
        weight * looked_at - (1 - weight) * power / sum(powers)
        for looked_at, power in zip(pooled, powers, strict=True)
    ]


def slow_lagkv(policy, keys, values, queries, scale):
    scores = [float(j + 1) for j in range(len(keys))]

    def alien(rows, following):
        spreads = []
        for row in rows:
            shares = []
            for d, x in enumerate(row):
                column = [other[d] for other in following]
                least, most = min(column), max(column)
                shares.append((x - least) / (most - least) if most > least else 0.0)
            mean = sum(shares) / len(shares)
            spreads.append(math.sqrt(sum((u - mean) ** 2 for u in shares) / (len(shares) - 1)))
        return [math.exp(s) / sum(math.exp(each) for each in spreads) for s in spreads]

    first, lag = policy.sinks, policy.lag
    while first + 2 * lag <= len(keys):
        own, following = slice(first, first + lag), slice(first + lag, first + 2 * lag)
        pairs = zip(alien(keys[own], keys[following]), alien(values[own], values[following]),
                    strict=True)  # fmt: skip
        worth = [k + v for k, v in pairs]
        for j, each in enumerate(worth):
            scores[first + j] = sum(other < each for other in worth) / lag
        first += lag
    return scores


def slow_cur(policy, keys, values, queries, scale):
    scores = []
    for j in range(len(keys)):
        local = policy.local or len(keys)
        block = range(j // local * local, min(j // local * local + local, len(keys)))
        score = 1.0
        for rows in (keys, values):
            score *= sum(x * x for x in rows[j]) / sum(x * x for i in block for x in rows[i])
        scores.append(score)
    return scores


def slow_chunkkv(policy, keys, values, queries, scale):
    slow = {KNorm: slow_knorm, SnapKV: slow_snapkv}[type(policy.base)]
    scores = slow(policy.base, keys, values, queries, scale)
    chunked = []
    for j in range(len(keys)):
        first = j // policy.length * policy.length
        chunk = scores[first : min(first + policy.length, len(keys) - policy.window)]
        chunked.append(sum(chunk) / len(chunk) if chunk else 0.0)
    return chunked


SLOW = [
    (KNorm(), slow_knorm),
    (KeyDiff(), slow_keydiff),
    (SnapKV(window=6), slow_snapkv),
    (SnapKV(window=6, pool=1), slow_snapkv),
    (SnapKV(window=6, pool=9), slow_snapkv),
    (TOVA(), slow_tova),
    (RKV(window=6), slow_r_kv),
    (RKV(window=6, pool=1, attention=0.7), slow_r_kv),
    (LagKV(lag=8), slow_lagkv),
    (LagKV(lag=5, sinks=0), slow_lagkv),
    (LagKV(lag=20, sinks=1), slow_lagkv),
    (LagKV(lag=1 << 60), slow_lagkv),
    (CUR(), slow_cur),
    (CUR(local=7), slow_cur),
    (CUR(local=None), slow_cur),
    (CUR(local=1 << 60), slow_cur),
    (ChunkKV(base=SnapKV(window=6), length=7), slow_chunkkv),
    (ChunkKV(base=KNorm(), length=10), slow_chunkkv),
    (ChunkKV(base=KNorm(), length=1), slow_chunkkv),
    (ChunkKV(base=KNorm(), length=1 << 60), slow_chunkkv),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy, slow", SLOW, ids=[str(policy) for policy, _ in SLOW])
def test_a_score_is_its_definition_on_a_ragged_batch(policy, slow, dtype, monkeypatch):
    monkeypatch.setattr(snapkv_module, "BLOCK", 16)  # many blocks, the last one not full
    monkeypatch.setattr(r_kv_module, "BLOCK", 300)
    prompt = prompts([40, 1, 17, 6, 3, 7], dtype=dtype)
    score = policy.score(prompt)
    assert score.dtype is torch.float32
    for b, length in enumerate(prompt.lengths.tolist()):
        for h in range(2):
            keys = prompt.keys[b, :length, h].double().tolist()
            values = prompt.values[b, :length, h].double().tolist()
            queries = prompt.queries[b, :, h].double().tolist()
            wanted = torch.tensor(slow(policy, keys, values, queries, prompt.scale))
            torch.testing.assert_close(score[b, h, :length], wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    "policy", [KNorm(), KeyDiff(), SnapKV(window=6), LagKV(lag=16), CUR(), Echo()], ids=str
)
def test_a_cache_of_eight_bits_keeps_what_its_numbers_say(policy, dtype):
    small = prompts([70, 33], dtype=dtype)
    small = replace(small, queries=small.queries.float())
    same = replace(small, keys=small.keys.float(), values=small.values.float())
    assert kept(policy, small, [20, 17]) == kept(policy, same, [20, 17])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_windows_of_queries_of_eight_bits_are_what_those_are(dtype):
    queries = torch.randn(9, 4, 16).to(dtype)
    early = Observed(row=0, era=0, tokens=slice(2, 5), offset=0, window=6)
    late = Observed(row=0, era=0, tokens=slice(3), offset=3, window=6)
    first = window_queries(early, queries, None)
    window = window_queries(late, queries.bfloat16(), first)
    assert torch.equal(window.float(), queries[[2, 3, 4, 0, 1, 2]].float())


def test_blocks_of_keys_change_no_score(monkeypatch):
    prompt, policy = prompts([50, 9, 33]), SnapKV(window=6)
    whole = policy.score(prompt)
    monkeypatch.setattr(snapkv_module, "BLOCK", 7)
    torch.testing.assert_close(policy.score(prompt), whole)


def test_the_window_attention_of_all_keys_sums_to_one():
    prompt = prompts([40, 1, 17, 6, 3])
    mass = snapkv_module.window_attention(prompt.queries, prompt)
    torch.testing.assert_close(mass.sum(2), torch.ones(5, 2))


def test_keydiff_of_a_zero_key_is_a_number():
    prompt = prompts([20])
    prompt.keys[0, 3] = 0
    assert KeyDiff().score(prompt)[0, :, 3].eq(0).all()
    prompt.keys[:] = 0
    assert KeyDiff().score(prompt).eq(0).all()


@pytest.mark.parametrize(
    "policy",
    [VaSE(budget=16, sinks=2, reserve=0.25), VaSE(budget=0.25, chunk=64, sinks=2, reserve=0.25)],
    ids=str,
)
def test_vase_keeps_the_longest_values_of_its_reserve_and_others_as_random(policy):
    """Poison behind the prompt is longer than all; lots are those of ``random``."""
    torch.manual_seed(0)
    T, kept = 48, 16
    prompt = PromptKV(
        keys=torch.randn(2, T, 3, 8), values=torch.randn(2, T, 3, 8), queries=None,
        lengths=torch.tensor([48, 37]), scale=1.0, page_size=1, event=3, first_head=5,
    )  # fmt: skip
    prompt.values[1, 37:] = 100
    ours = keep_tokens(policy, prompt, torch.full((2,), kept), kept)
    lots = Random(budget=16).score(prompt)
    for request, length in enumerate([48, 37]):
        for head in range(3):
            norms = prompt.values[request, :length, head].norm(dim=1)
            longest = norms.topk(4).indices.tolist()
            others = [j for j in range(2, length) if j not in longest]
            others.sort(key=lambda j: float(-lots[request, head, j]))
            wanted = {0, 1, *longest}
            wanted |= set(others[: kept - len(wanted)])
            assert set(ours[request, head].tolist()) == wanted


def test_a_channel_without_range_counts_as_nothing_to_lagkv():
    prompt = prompts([40])
    prompt.keys[..., 0] = prompt.values[..., 0] = 0
    other = replace(prompt, keys=prompt.keys.clone(), values=prompt.values.clone())
    other.keys[:, :20, :, 0] = 7  # ahead of where the next partition is all 0
    score = LagKV(lag=20, sinks=0).score(prompt)
    assert score.isfinite().all()
    assert score.equal(LagKV(lag=20, sinks=0).score(other))
    prompt.keys[:] = prompt.values[:] = 0
    ranks = LagKV(lag=20, sinks=0).score(prompt)[0, 0, :20] * 20
    assert ranks.round().tolist() == list(range(19, -1, -1))


def test_lagkv_keeps_equally_many_of_each_partition_and_the_newest_of_what_has_no_next():
    policy, prompt = LagKV(lag=8, sinks=4), prompts([4 + 5 * 8 + 3], page_size=1)
    for head in kept(policy, prompt, [4 + 11 + 4 * 3])[0]:
        assert head[:4] == [0, 1, 2, 3]
        assert head[-11:] == list(range(36, 47))
        assert np.bincount((np.array(head[4:-11]) - 4) // 8).tolist() == [3, 3, 3, 3]
    assert kept(policy, prompt, [9]) == [[[0, 1, 2, 3, 42, 43, 44, 45, 46]] * 2]


def test_cur_of_zero_rows_is_a_number():
    prompt = prompts([20])
    prompt.values[:, :16] = 0
    assert CUR().score(prompt)[..., :16].eq(0).all()
    assert CUR().score(prompt)[..., 16:20].gt(0).all()


def test_chunks_stay_whole_and_what_is_left_goes_to_the_next_chunks_first_tokens():
    scores = [[9.0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 1, 1, 1, 1, 1, 5, 5, 5, 5, 5, 2, 2]]
    prompt = scored([scores], [22], 1)
    policy = ChunkKV(base=Echo(sinks=0), length=5)
    assert kept(policy, prompt, [12]) == [[[*range(5, 10), *range(15, 20), 20, 21]]]
    assert kept(policy, prompt, [14]) == [[[0, 1, *range(5, 10), *range(15, 22)]]]


def test_a_window_stays_and_counts_for_no_chunk():
    scores = [[3.0, 3, 3, 3, 3, 4, 4, -99, -99, -99]]
    policy = ChunkKV(base=Echo(sinks=0, window=3), length=5)
    assert kept(policy, scored([scores], [10], 1), [5]) == [[[5, 6, 7, 8, 9]]]


def test_a_chunk_is_what_its_base_is():
    assert {f.name for f in dataclasses.fields(ChunkKV) if f.init} == {"base", "length"}
    for base in (SnapKV(budget=512, interval=128), CUR(budget=99), Random(window=3)):
        chunked = ChunkKV(base=base)
        for field in dataclasses.fields(ScoredEviction):
            assert getattr(chunked, field.name) == getattr(base, field.name)
        for name in ("evidence", "needs_queries", "query_agnostic", "publishes"):
            assert getattr(chunked, name) == getattr(base, name)
    with pytest.raises(ValueError, match="budget"):
        replace(ChunkKV(), budget=3)


POLICIES = [
    KNorm(), KeyDiff(), SnapKV(window=6), Random(), Random(seed=7), TOVA(), RKV(window=6),
    LagKV(lag=16), CUR(), CUR(local=None), ChunkKV(base=SnapKV(window=6)), ChunkKV(base=CUR()),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_batch_scores_as_its_requests_alone(policy):
    prompt = prompts([40, 1, 17, 100])
    score = policy.score(prompt)
    for b, length in enumerate(prompt.lengths.tolist()):
        torch.testing.assert_close(score[b, :, :length], policy.score(alone(prompt, b))[0])


# Random draws the same lots wherever a head and a position come to be drawn.


def test_random_falls_by_position_and_global_head_alone():
    score = Random(seed=3).score(prompts([40, 100], H=4))
    assert score[0].equal(score[1])
    other = prompts([100], H=4, D=16, seed=9)
    assert Random(seed=3).score(other)[0].equal(score[0])
    second_rank = replace(prompts([40, 100], H=2), first_head=2)
    assert Random(seed=3).score(second_rank).equal(score[:, 2:])


def test_random_is_uniform_and_differs_by_head_and_seed():
    prompt = prompts([20_000], H=4, D=1, W=1)
    lots = torch.cat([Random(seed=seed).score(prompt)[0] for seed in (0, 1, (1 << 32) - 1)])
    assert lots.min() >= 0
    assert lots.max() < 1
    bins = torch.stack([row.histc(100, 0, 1) for row in lots])
    chi2 = ((bins - 200) ** 2 / 200).sum(1)  # 99 degrees of freedom: mean 99, deviation 14
    assert (chi2 - 99).abs().max() < 5 * 14
    correlations = torch.corrcoef(lots) - torch.eye(12)
    assert correlations.abs().max() < 5 / math.sqrt(20_000)
    neighbours = torch.corrcoef(torch.stack([lots[0, 1:], lots[0, :-1]]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(20_000)


def test_random_is_the_hash_it_names():
    def mixed(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    score = Random(seed=5).score(replace(prompts([50]), first_head=6))[0]
    for h in range(2):
        for j in range(50):
            lot = mixed(mixed(mixed(5) ^ (6 + h)) ^ j)
            assert score[h, j] == (lot >> 8) / 2**24


# What is kept.


def promised(policy, scores, length, page_size, keep, protect):
    """One head's kept tokens, by sorting Python tuples."""

    def rank(j):
        if j < policy.sinks:
            return (0, j)
        if any(first <= j < last for first, last in protect):
            return (1, j)
        if j >= length - policy.window:
            return (2, -j)
        return (3, math.inf if math.isnan(scores[j]) else -scores[j], j)

    return sorted(sorted(range(length // page_size * page_size), key=rank)[:keep])


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, math.inf, -math.inf, NAN])


@st.composite
def cases(draw):
    B, H = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 40), min_size=B, max_size=B))
    T = max(lengths) + draw(st.integers(1, 5))
    each = VALUES | st.floats(-3, 3, width=32)
    scores = draw(
        st.lists(
            st.lists(st.lists(each, min_size=T, max_size=T), min_size=H, max_size=H),
            min_size=B,
            max_size=B,
        )
    )
    spans = st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda s: (s[0], s[0] + s[1]))
    return (
        Echo(sinks=draw(st.integers(0, 9)), window=draw(st.integers(0, 9))),
        scores,
        lengths,
        draw(st.sampled_from([1, 2, 4, 16])),
        draw(st.lists(st.integers(0, 50), min_size=B, max_size=B)),
        draw(st.lists(spans, max_size=2)),
    )


@given(cases())
@settings(max_examples=300, deadline=None)
def test_kept_tokens_are_what_was_promised(case):
    policy, scores, lengths, page_size, keep, protect = case
    prompt = scored(scores, lengths, page_size)
    tokens = kept(policy, prompt, keep, protect)
    for b, length in enumerate(lengths):
        whole = length // page_size * page_size
        always = {*range(policy.sinks), *range(length - policy.window, length)}.union(
            *(range(*span) for span in protect)
        ) & set(range(whole))
        for h, head in enumerate(tokens[b]):
            assert head == promised(policy, scores[b][h], length, page_size, keep[b], protect)
            assert len(head) == len(set(head)) == min(keep[b], whole)
            assert head == sorted(head)
            if keep[b] >= whole:
                assert head == list(range(whole))
            if keep[b] >= len(always):
                assert always <= set(head)
        if length:
            assert tokens[b] == kept(policy, alone(prompt, b), keep[b : b + 1], protect)[0]


def test_among_equals_the_lower_position_is_kept():
    prompt = scored([[[1.0] * 64, [0.0, -0.0] * 32]], [64], S)
    assert kept(Echo(sinks=0), prompt, [20]) == [[list(range(20))] * 2]
    assert kept(Echo(sinks=2, window=3), prompt, [20]) == [[[*range(17), 61, 62, 63]] * 2]


def test_a_budget_too_small_for_all_that_never_goes_keeps_sinks_then_spans_then_the_newest():
    prompt = scored([[[1.0] * 64]], [64], S)
    policy, protect = Echo(sinks=4, window=8), [(20, 24)]
    assert kept(policy, prompt, [2], protect) == [[[0, 1]]]
    assert kept(policy, prompt, [6], protect) == [[[0, 1, 2, 3, 20, 21]]]
    assert kept(policy, prompt, [10], protect) == [[[0, 1, 2, 3, 20, 21, 22, 23, 62, 63]]]


def test_the_window_counts_from_the_prompts_end_and_only_whole_pages_are_candidates():
    prompt = scored([[[1.0] * 40]], [40], S)  # the last page holds 8 of the 10 newest
    assert kept(Echo(sinks=0, window=10), prompt, [5]) == [[[0, 1, 2, 30, 31]]]


def test_a_width_beyond_the_batch_is_filled_with_zeros():
    prompt = scored([[[1.0] * 32]], [32], S)
    tokens = keep_tokens(Echo(), prompt, torch.tensor([40]), 40)
    assert tokens[0, 0].tolist() == [*range(32), *[0] * 8]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_garbage_never_leaks(policy):
    prompt = prompts([40, 1, 17, 100, 64], H=3)
    clean = replace(
        prompt,
        keys=prompt.keys.nan_to_num(0.0),
        values=prompt.values.nan_to_num(0.0),
        queries=prompt.queries.nan_to_num(0.0),
    )
    keep = [16, 16, 16, 48, 32]
    assert kept(policy, prompt, keep) == kept(policy, clean, keep)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nothing_synchronises(policy):
    """A tensor on the meta device has no values: asking for one raises."""
    prompt = prompts([40, 17, 100])
    device = {
        name: getattr(prompt, name).to("meta") for name in ("keys", "values", "queries", "lengths")
    }
    keep = torch.tensor([16, 16, 48], device="meta")
    tokens = keep_tokens(policy, replace(prompt, **device), keep, 48, [(8, 12)])
    assert tokens.shape == (3, 2, 48)
    assert tokens.device.type == "meta"


@pytest.mark.parametrize(
    "wrong",
    [lambda s: s[:, :1], lambda s: s.double(), lambda s: s.transpose(1, 2)],
    ids=["heads", "dtype", "axes"],
)
def test_a_wrong_score_says_what_it_should_be(wrong):
    class Wrong(Echo):
        name = "wrong"

        def score(self, prompt):
            return wrong(super().score(prompt))

    with pytest.raises(ValueError, match=r"wrong\.score must return torch\.float32 \[1, 2, 37\]"):
        keep_tokens(Wrong(), prompts([32]), torch.tensor([16]), 16)


# kvpress 0.5.5, asked by tools/kvpress_fixtures.py.

KV = "keys", "values"
CASES = [name.split("/") for name in KVPRESS.files if name.count("/") == 2]


@pytest.mark.parametrize("case, name, count", CASES, ids=map("-".join, CASES))
def test_kvpress_keeps_the_same_tokens(case, name, count):
    """With pages of one token, which kvpress has not, and its sinks. No set differs."""
    window, pool, lag = KVPRESS[f"{case}/shape"][5:].tolist()
    policy = {
        "snapkv": SnapKV(window=window, pool=pool),
        "keydiff": KeyDiff(sinks=0),
        "knorm": KNorm(sinks=0),
        "lagkv": LagKV(lag=lag),
        "cur": CUR(),
        "chunkkv": ChunkKV(base=KeyDiff(sinks=0), length=24),
    }[name]
    keys, values = (torch.from_numpy(KVPRESS[f"{case}/{each}"]).float() for each in KV)
    B, T, _, D = keys.shape
    prompt = PromptKV(
        keys=keys,
        values=values,
        queries=torch.from_numpy(KVPRESS[f"{case}/queries"]),
        lengths=torch.full((B,), T),
        scale=D**-0.5,
        page_size=1,
    )
    tokens = keep_tokens(policy, prompt, torch.full((B,), int(count)), int(count))
    assert tokens.tolist() == KVPRESS[f"{case}/{name}/{count}"].tolist()


def test_kvpress_answered_for_every_policy_and_group():
    names = {"snapkv", "keydiff", "knorm", "lagkv", "cur", "chunkkv"}
    assert {name for _, name, _ in CASES} == names
    groups = {int(KVPRESS[f"{case}/shape"][3]) for case, _, _ in CASES}
    assert groups == {1, 3, 4}


# As a policy: the line, the budget, what it is allowed.

budgets = {"budget": st.integers(999, 1 << 40), "sinks": st.integers(0, 99)}
scored_evictions = st.one_of(
    st.builds(
        SnapKV,
        **budgets,
        window=st.integers(1, 900),
        pool=st.integers(0, 50).map(lambda n: 2 * n + 1),
    ),
    st.builds(KeyDiff, **budgets, window=st.integers(0, 900)),
    st.builds(KNorm, **budgets, window=st.integers(0, 900)),
    st.builds(LagKV, **budgets, window=st.integers(0, 900), lag=st.integers(2, 1 << 40)),
    st.builds(CUR, **budgets, local=st.none() | st.integers(2, 1 << 40)),
    st.builds(
        ChunkKV,
        base=st.builds(CUR, **budgets, local=st.none()),
        length=st.integers(1, 1 << 40),
    ),
    st.builds(Random, **budgets, window=st.integers(0, 900), seed=st.integers(0, (1 << 32) - 1)),
)


@given(scored_evictions)
@settings(deadline=None)
def test_the_printed_form_parses_back(policy):
    assert parse(str(policy)) == Composition((policy,))
    both = parse(f"quest + {policy}")
    assert both.scored == policy
    assert both.eviction is None
    assert both.selector is not None


@pytest.mark.parametrize(
    "line, printed",
    [
        ("snapkv", "snapkv(budget=1024, sinks=0, window=64, pool=5)"),
        ("keydiff", "keydiff(budget=1024, sinks=4, window=0)"),
        ("tova", "tova(budget=1024, sinks=0, window=1, interval=128)"),
        (
            "r_kv(interval=256)",
            "r_kv(budget=1024, sinks=0, window=8, interval=256, attention=0.1, pool=7)",
        ),
        ("knorm(budget=512)", "knorm(budget=512, sinks=4, window=0)"),
        ("random(window=32)", "random(budget=1024, sinks=4, window=32, seed=0)"),
        ("lagkv", "lagkv(budget=1024, sinks=4, window=0, lag=128)"),
        (
            "vase(interval=128)",
            "vase(budget=1024, sinks=4, window=0, interval=128, seed=0, reserve=0.1)",
        ),
        ("cur", "cur(budget=1024, sinks=4, window=0, local=16)"),
        ("cur(local=None)", "cur(budget=1024, sinks=4, window=0, local=None)"),
        (
            "chunkkv",
            "chunkkv(snapkv(budget=1024, sinks=0, window=64, pool=5), length=10)",
        ),
        (
            "chunkkv(cur(interval=128), length=16)",
            "chunkkv(cur(budget=1024, sinks=4, window=0, interval=128, local=16), length=16)",
        ),
    ],
)
def test_a_line_prints_in_full(line, printed):
    assert str(parse(line)) == printed


def test_only_what_ignores_the_question_may_be_shared():
    own, nobody = Sharing.OWN, Sharing.NOBODY
    shared = {
        "tova": nobody, "r_kv": nobody, "snapkv": nobody, "keydiff": own, "knorm": own,
        "lagkv": own, "cur": own, "chunkkv": nobody, "chunkkv(cur)": own,
        "random": own, "vase": own, "streaming_llm": own, "a_shape": own, "tri_shape": own,
        "quest": Sharing.PLAIN, "dense": Sharing.PLAIN, "snapkv + quest": nobody,
        "a_shape + quest": own, "tri_shape + snapkv": nobody,
    }  # fmt: skip
    assert {line: parse(line).publishes for line in shared} == shared


def test_a_budget_is_rounded_up_to_whole_pages():
    policy = KNorm(budget=100)
    assert [policy.pages(size) for size in (1, 16, 64, 128)] == [100, 7, 2, 1]
    assert policy.pages(16, 40) == 3


def test_who_asks_for_queries():
    assert [policy.name for policy in POLICIES if policy.needs_queries] == [
        "snapkv", "tova", "r_kv", "chunkkv",
    ]  # fmt: skip


BAD = [
    (
        "snapkv(budget=0)",
        "snapkv: budget must be a number of tokens, at least 1, got 0; write snapkv(budget=1024)",
    ),
    ("knorm(budget=0.5)", "write knorm(budget=0.5, chunk=512) or knorm(budget=1024)"),
    ("keydiff(budget=True)", "keydiff: budget must be a number of tokens, at least 1, got True"),
    ("random(budget='1k')", "random: budget must be a number of tokens, at least 1, got '1k'"),
    (
        "keydiff(sinks=-1)",
        "sinks must be a number of tokens, at least 0, got -1; write keydiff(sinks=4)",
    ),
    (
        "snapkv(sinks=None)",
        "sinks must be a number of tokens, at least 0, got None; write snapkv(sinks=0)",
    ),
    (
        "snapkv(window=0)",
        "window must be a number of tokens, at least 1, got 0; write snapkv(window=64)",
    ),
    ("knorm(window=-1)", "knorm: window must be a number of tokens, at least 0, got -1"),
    ("snapkv(budget=10)", "snapkv: budget must be at least sinks + window = 64 tokens, got 10"),
    ("random(budget=10, sinks=6, window=5)", "at least sinks + window = 11 tokens, got 10"),
    (
        "snapkv(pool=4)",
        "snapkv: pool must be an odd number of tokens below 2 ** 31, got 4; write snapkv(pool=5)",
    ),
    ("snapkv(pool=-1)", "pool must be an odd number of tokens below 2 ** 31, got -1"),
    ("snapkv(pool=True)", "pool must be an odd number of tokens below 2 ** 31, got True"),
    ("snapkv(pool=5.0)", "pool must be an odd number of tokens below 2 ** 31, got 5.0"),
    (
        "random(seed=-1)",
        "random: seed must be a whole number of at least 0 and below 2 ** 32, got "
        "-1; write random(seed=0)",
    ),
    ("random(seed=4294967296)", "below 2 ** 32, got 4294967296"),
    ("random(seed=False)", "below 2 ** 32, got False"),
    ("random(seed=None)", "below 2 ** 32, got None"),
    (
        "lagkv(lag=1)",
        "lagkv: lag must be a number of tokens, at least 2, got 1; write lagkv(lag=128)",
    ),
    ("lagkv(lag=True)", "lag must be a number of tokens, at least 2, got True"),
    (
        "cur(local=1)",
        "cur: local must be a number of tokens, at least 2, or None, got 1; write cur(local=16)",
    ),
    ("cur(local=16.0)", "at least 2, or None, got 16.0"),
    (
        "vase(reserve=0)",
        "vase: reserve must be a share of the budget, above 0 and at most 1, got 0; write "
        "vase(reserve=0.1), or random for 0",
    ),
    ("vase(reserve=True)", "above 0 and at most 1, got True"),
    (
        "chunkkv(snapkv, length=0)",
        "chunkkv: length must be a number of tokens, at least 1, got 0; write "
        "chunkkv(snapkv(budget=1024), length=10)",
    ),
    ("chunkkv(knorm, length='10')", "at least 1, got '10'"),
    (
        "chunkkv(quest)",
        "chunkkv wraps a policy that scores a prompt's tokens, got quest(budget=2048, "
        "dense_layers=2); write chunkkv(snapkv(budget=1024))",
    ),
    ("chunkkv(snapkv(budget=10))", "snapkv: budget must be at least sinks + window = 64 tokens"),
    ("chunkkv(budget=64)", "chunkkv has no option 'budget'. Known: base, length."),
    ("chunkkv(snapkv) + knorm", "chunkkv and knorm both answer the stage 'compress'"),
    (
        "knorm(pool=5)",
        "knorm has no option 'pool'. Known: budget, chunk, interval, sinks, window.",
    ),
    ("snapkv + knorm", "snapkv and knorm both answer the stage 'compress'; keep one of them"),
    ("streaming_llm + snapkv", "streaming_llm and snapkv both answer the stage 'compress'"),
    ("snap_kv", "unknown policy 'snap_kv'. Did you mean 'snapkv'?"),
]


@pytest.mark.parametrize("line, part", BAD, ids=[line for line, _ in BAD])
def test_a_wrong_line_says_what_to_write(line, part):
    with pytest.raises(ValueError, match=r".") as caught:
        parse(line)
    assert part in str(caught.value)
