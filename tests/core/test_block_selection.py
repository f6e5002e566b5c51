"""Which pages a block of a prompt's queries reads, against the definitions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplug import (
    Asking,
    Blocks,
    KeyCodes,
    LastQueries,
    Planner,
    QueryBlocks,
    Settings,
    choose_pages,
    parse,
    read_offer,
    step_reads,
)
from kvplug.policies.block_quest import BlockQuest
from kvplug.policies.flexprefill import FlexPrefill
from kvplug.policies.minference import FIRST, NEAREST, MInference
from kvplug.policies.random_prefill import RandomPrefill
from kvplug.policies.xattention import XAttention
from tests.core.test_prefill import pages_of, sizes, step

claims = hypothesis_settings(max_examples=120, deadline=None)


@st.composite
def blocks_settings(draw, beside=("", " + quest(budget=64)", " + streaming_llm(window=90)")):
    sinks, block = draw(st.sampled_from([0, 16, 40])), draw(st.sampled_from([64, 128]))
    budget = draw(st.integers(sinks + block, 400))
    share = draw(st.sampled_from([None, 0.5, 1.0]))
    line = (
        f"random_prefill(sinks={sinks}, block={block}, last={draw(st.sampled_from([0, 1, 64]))}, "
        f"budget={budget}, threshold={share})"
    )
    return Settings(
        policy=parse(line + draw(st.sampled_from(beside))),
        min_context=draw(st.sampled_from([0, 100])),
        shortcut=draw(st.booleans()),
    )


@claims
@given(
    blocks_settings(), sizes, st.integers(1, 420), st.integers(1, 420),
    st.sets(st.integers(1, 419)),
)  # fmt: skip
def test_what_a_block_may_choose_follows_from_its_place_alone(settings, S, total, prompt, cuts):
    planner, policy = Planner(settings, S), settings.policy.generate
    sinks, evicts = -(-policy.sinks // S), settings.policy.eviction is not None
    seen = 0
    for start, stop in pairwise([0, *sorted(cut for cut in cuts if cut < total), total]):
        segments = planner.plan(*step((9, 1, 4), (start, stop - start, prompt)))
        segments = segments.where(segments.row == 1)
        for n in range(len(segments.row)):
            first, last = int(segments.start[n]), int(segments.stop[n]) - 1
            begin = first // policy.block * policy.block
            pages = pages_of(planner, segments, n, last)
            own = [p for p in pages if p >= max(begin // S, segments.first[n])]
            before = len(pages) - len(own)
            sparse = settings.min_context <= first < prompt - policy.last
            whole = -(-(begin + policy.block) // S) - begin // S  # pages of the whole block
            most = max(-(-policy.budget // S) - whole, sinks)
            nothing = before <= (most if policy.threshold in (None, 1.0) else sinks)
            asked = sparse and not (settings.shortcut and nothing)
            assert bool(segments.selects[n] & ~segments.decodes[n]) == asked
            if asked:
                assert last // policy.block == first // policy.block, "one block"
                one = segments.where(np.arange(len(segments.row)) == n)
                assert planner.own_pages(one).tolist() == [len(own)]
                assert planner.selection(one).tolist() == [len(own) + min(before, most)]
                if not evicts:
                    assert last == min(begin + policy.block, prompt - policy.last, stop) - 1
            seen += last + 1 - first
    assert seen == total


def paged(n, S, H, D, lengths, G, rows, seed=0, dtype=torch.float32):
    """n blocks of rows[i] queries that see lengths[i] tokens, in a cache whose other pages are
    poison."""
    torch.manual_seed(seed)
    P = -(-max(lengths) // S)
    keys = torch.full((n * P + 3, S, H, D), torch.nan).to(dtype)
    table = torch.randperm(n * P).view(n, P).to(torch.int32)
    bounds = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    for i, length in enumerate(lengths):
        seen = torch.randn(length, H, D).to(dtype)
        for p in range(-(-length // S)):
            part = seen[p * S : (p + 1) * S]
            keys[table[i, p], : len(part)] = part
    blocks = QueryBlocks(
        query=torch.randn(int(bounds[-1]), H, G, D).to(dtype), bounds=bounds,
        start=torch.tensor(lengths, dtype=torch.int32) - torch.tensor(rows, dtype=torch.int32),
        size=64, scale=D**-0.5,
    )  # fmt: skip
    pages = torch.tensor([-(-length // S) for length in lengths], dtype=torch.int32)
    return blocks, keys, table, pages


SHAPES = [(16, 1, 3), (32, 3, 1), (64, 2, 4), (128, 1, 8)]
LENGTHS = (700, 65, 130, 1, 333)
ROWS = (64, 1, 60, 1, 13)


def keys_seen(keys, table, pages, i, length):
    return keys[table[i, : pages[i]].long()].flatten(0, 1)[:length].double()


@pytest.mark.parametrize("S, H, G", SHAPES)
@pytest.mark.parametrize("stride", [8, 16])
def test_xattention_is_the_softmax_of_antidiagonals(S, H, G, stride):
    blocks, keys, table, pages = paged(5, S, H, 24, LENGTHS, G, ROWS)
    shares = XAttention(stride=stride).score(blocks, keys, None, table, pages)
    for i, (length, rows) in enumerate(zip(LENGTHS, ROWS, strict=True)):
        k = keys_seen(keys, table, pages, i, length)
        q = blocks.query[blocks.bounds[i] : blocks.bounds[i + 1]].double()
        for h in range(H):
            wanted = torch.zeros(table.shape[1], dtype=torch.float64)
            groups = range((length - rows) // stride, -(-length // stride))
            for r in groups:
                for g in range(G):
                    logits = torch.zeros(r + 1, dtype=torch.float64)
                    for c in range(r + 1):
                        for j in range(stride):
                            at, token = r * stride + stride - 1 - j, c * stride + j
                            if length - rows <= at < length and token < length:
                                logits[c] += q[at - length + rows, h, g] @ k[token, h]
                    weights = (logits * blocks.scale / stride).softmax(0) / (G * len(groups))
                    wanted.index_add_(0, torch.arange(r + 1) * stride // S, weights)
            torch.testing.assert_close(shares[i, h].double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("S, H, G", SHAPES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("codes", [False, True])
def test_block_quest_is_the_softmax_of_a_mean_query_s_bounds(S, H, G, parts, codes):
    blocks, keys, table, pages = paged(5, S, H, 24, LENGTHS, G, ROWS)
    digest = torch.full((len(keys), parts, H, 2, 24), torch.nan)
    for i, length in enumerate(LENGTHS):
        k = keys_seen(keys, table, pages, i, length).float()
        for part in range(-(-length // (S // parts))):
            own = k[part * S // parts : (part + 1) * S // parts]
            page, at = table[i, part // parts].long(), part % parts
            digest[page, at, :, 0], digest[page, at, :, 1] = own.amin(0), own.amax(0)
            digest[page, at + 1 :] = digest[page, at, None]  # nothing yet: as the part before
    policy, given, counted = BlockQuest(), digest, pages
    if codes:  # of two bits, and four rows of what they number; a block's last page has none yet
        policy, counted = policy.over(KeyCodes(2)), pages - 1
        low, high = digest.unbind(3)
        given = torch.stack([low, (high - low) / 3, *[torch.full_like(low, torch.nan)] * 4], 3)
        given[table.gather(1, counted[:, None].long()).flatten().long()] = torch.nan
    given = given if parts > 1 else given[:, 0]
    shares = policy.score(blocks, None, given, table, pages)
    for i in range(len(LENGTHS)):
        q = blocks.query[blocks.bounds[i] : blocks.bounds[i + 1]].double().mean(0)  # [H, G, D]
        page = digest[table[i, : counted[i]].long()].double()  # [P, parts, H, 2, D]
        least, most = page[:, :, :, 0], page[:, :, :, 1]
        for h in range(H):
            asked = q[h, :, None, None]  # [G, 1, 1, D] over [P, parts, D]
            ends = torch.maximum(asked * least[..., h, :], asked * most[..., h, :])
            logits = ends.sum(-1).amax(-1) * blocks.scale  # [G, P]
            wanted = torch.zeros(table.shape[1], dtype=torch.float64)
            wanted[: counted[i]] = logits.softmax(-1).mean(0)
            wanted[0] += counted[i] == 0
            torch.testing.assert_close(shares[i, h].double(), wanted, atol=1e-5, rtol=1e-4)


def test_evidence_is_the_server_s_and_options_stay():
    offer = read_offer({"policy": "twilight(bits=4)", "allow": ["block_quest"]}, environ={})
    assert offer.digest == KeyCodes(4)
    assert [each.digest for each in offer.block_selectors] == [KeyCodes(4)]
    asked = offer.settings_for("block_quest(budget=512, sinks=32) + twilight(bits=4)")
    generate = asked.policy.generate
    assert (generate.budget, generate.sinks, generate.digest) == (512, 32, KeyCodes(4))
    assert parse(str(generate)).generate == BlockQuest(budget=512, sinks=32)
    assert offer.settings_for("block_quest").policy.generate.digest == KeyCodes(4)
    own = read_offer({"policy": "block_quest + twilight", "allow": ["block_quest"]}, environ={})
    assert len(own.block_selectors) == 1
    assert parse("block_quest + quest").generate.digest == parse("quest").selector.digest
    assert parse("xattention + twilight").generate.digest is None


@claims
@given(
    st.integers(0, 5), st.sampled_from([None, 0.3, 0.9, 1.0]), st.integers(0, 9999),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(0, 20)), min_size=1,
             max_size=4),
)  # fmt: skip
def test_the_largest_shares_are_read_until_they_hold_the_threshold(sinks, threshold, seed, rows):
    torch.manual_seed(seed)
    P, H, n = 40, 2, len(rows)
    pages = torch.tensor([r[0] for r in rows], dtype=torch.int32)
    own = torch.tensor([min(r[1], r[0]) for r in rows], dtype=torch.int32)
    least = [min(int(own[i]) + sinks, r[0]) for i, r in enumerate(rows)]
    keep = torch.tensor(
        [min(least[i] + r[2], r[0]) for i, r in enumerate(rows)], dtype=torch.int32
    )
    given = torch.randint(0, 4, (n, H, P)).float()  # ties
    given[:, :, 0].clamp_(min=1)  # what is shared is never nothing
    given[torch.arange(P) >= pages[:, None, None].expand(n, H, 1)] = torch.nan
    given = given / given.nansum(-1, keepdim=True).clamp(min=1)

    class Given(RandomPrefill):
        def score(self, *_):
            return given

    width = int(keep.max()) + 2
    none = torch.zeros(0)
    blocks = Blocks(size=64, bounds=none, start=none, own=own, sinks=sinks, rows=none)
    chosen, counts = choose_pages(
        Given(threshold=threshold), blocks, none, None, None, none, pages, keep, width=width,
        scale=1.0,
    )  # fmt: skip
    for i, (seen, *_) in enumerate(rows):
        for h in range(H):
            forced = {p for p in range(seen) if p < sinks or p >= seen - int(own[i])}
            share = given[i, h].tolist()
            rest = sorted(set(range(seen)) - forced, key=lambda p: (-share[p], p))
            read, held = sorted(forced), sum(share[p] for p in forced)
            for p in rest:
                ends = (threshold or 1) < 1 and held >= threshold - 1e-6
                if ends or len(read) == int(keep[i]):
                    break
                read.append(p)
                held += share[p]
            got = chosen[i, h, : counts[i, h]].tolist()
            assert got == sorted(read) or abs(held - (threshold or 9)) < 1e-5
            assert chosen[i, h, counts[i, h] :].tolist() == [0] * (width - len(got))


def asked(S, H, G, D=24):
    """Two prompts: two blocks of the one, of which the second is cut, and three of the other, with
    the queries that they and what stands behind them bring."""
    lengths, rows = (600, 640, 130, 192, 230), (24, 40, 2, 62, 38)
    blocks, keys, table, pages = paged(5, S, H, D, (640, 640, 230, 230, 230), G, rows, seed=4)
    pages = torch.tensor([-(-length // S) for length in lengths], dtype=torch.int32)
    table[1], table[0, pages[0] :] = table[0], 1 << 30  # never read
    table[2] = table[3] = table[4]
    start = torch.tensor(lengths, dtype=torch.int32) - torch.tensor(rows, dtype=torch.int32)
    last = LastQueries(
        query=torch.randn(2, 64, H, G, D), count=torch.tensor([64, 17], dtype=torch.int32),
        seen=torch.tensor([655, 237], dtype=torch.int32), block=torch.tensor([1, 4]),
        run=torch.tensor([0, 0, 1, 1, 1]),
    )  # fmt: skip
    return replace(blocks, start=start, last=last), keys, table, pages, lengths, rows


def last_weights(blocks, keys, table, pages, length, r, h):
    """Attention of a prompt's last queries, by position: mean over the group. {position: [T]}"""
    last = blocks.last
    b = int(last.block[r])
    k = keys_seen(keys, table, pages, b, length)[:, h]
    found = {}
    for back in range(int(last.count[r])):
        at = int(last.seen[r]) - 1 - back
        q = last.query[r, -1 - back, h].double()  # [G, D]
        logits = (q @ k.T * blocks.scale)[:, : at + 1]
        share = torch.zeros(length, dtype=torch.double)
        share[: at + 1] = logits.softmax(-1).mean(0)
        found[at] = share
    return found


def pages_by(columns, diagonals, start, stop, S):
    """Pages in which a query of the block reads a column or stands on a diagonal."""
    read = {t // S for t in columns if t < stop}
    return read | {(i - d) // S for d in diagonals for i in range(start, stop) if i >= d}


def sums(weights, tokens, most):
    columns, diagonals = sum(weights.values()), torch.zeros(most, dtype=torch.double)
    for at, share in weights.items():
        for t in range(max(at + 1 - most, 0), min(tokens, at + 1)):
            diagonals[at - t] += share[t]
    return columns, diagonals


def greatest(values, number):
    return set(sorted(range(len(values)), key=lambda t: -float(values[t]))[:number])


@pytest.mark.parametrize("S, H, G", SHAPES[:3])
def test_columns_and_diagonals_are_those_of_the_last_queries(S, H, G):
    blocks, keys, table, pages, lengths, rows = asked(S, H, G)
    policy = MInference(vertical=34, slash=104)
    shares = policy.score(blocks, keys, None, table, pages)
    alike = shares / shares.amax(-1, keepdim=True)
    for i, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        r = int(blocks.last.run[i])
        whole = lengths[int(blocks.last.block[r])]
        for h in range(H):
            weights = last_weights(blocks, keys, table, pages, whole, r, h)
            columns, diagonals = sums(weights, whole, -(-whole // S) * S)
            columns[:FIRST], diagonals[:NEAREST] = torch.inf, torch.inf
            chosen = greatest(columns, 34), greatest(diagonals, 104)
            wanted = pages_by(*chosen, length - count, length, S)
            assert set(shares[i, h].nonzero().flatten().tolist()) == wanted
            assert alike[i, h][sorted(wanted)].min() >= 0.5, "all are read before any is not"
    torch.testing.assert_close(shares.sum(-1), torch.ones(5, H))


@pytest.mark.parametrize("tau", [0, 0.3, 1])
@pytest.mark.parametrize("S, H, G", SHAPES[:3])
def test_flexprefill_covers_what_its_pattern_weighs(S, H, G, tau):
    blocks, keys, table, pages, lengths, rows = asked(S, H, G)
    keys *= 2  # so that estimates are near and far
    policy = FlexPrefill(threshold=0.6, tau=tau, min_budget=40)
    shares, looked = policy.score(blocks, keys, None, table, pages), set()
    for i, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        r, P = int(blocks.last.run[i]), int(pages[i])
        b = int(blocks.last.block[r])
        whole, every = lengths[b], int(pages[b])
        found = keys_seen(keys, table, pages, b, whole)
        pooled = torch.stack([found[p * S : (p + 1) * S].mean(0) for p in range(every)])
        for h in range(H):
            weights = last_weights(blocks, keys, table, pages, whole, r, h)
            columns, diagonals = sums(weights, whole, every * S)
            a = torch.stack([columns[p * S : (p + 1) * S].sum() for p in range(every)])
            q = blocks.last.query[r, -int(blocks.last.count[r]) :, h].double().mean(0)
            given = (q @ pooled[:, h].T * blocks.scale).softmax(-1).mean(0)
            apart = js(a / a.sum(), given) ** 0.5
            assert abs(apart - tau) > 1e-4
            looks = apart < tau
            looked.add(looks)
            q = blocks.query[blocks.bounds[i] : blocks.bounds[i + 1], h].double().mean(0)
            asks = (q @ pooled[:P, h].T * blocks.scale).softmax(-1).mean(0)
            if looks:
                wanted = fewest(asks, 0.6)
            else:
                chosen = fewest(columns, 0.6), fewest(diagonals, 0.6)
                wanted = pages_by(*chosen, length - count, length, S)
            wanted |= greatest(asks if looks else a[:P], -(-40 // S))
            assert set(shares[i, h].nonzero().flatten().tolist()) == wanted
    assert looked == ({False} if tau == 0 else {True} if tau == 1 else looked)


def js(a, b):
    middle = (a + b) / 2
    return sum(float(torch.special.xlogy(one, one / middle).sum()) for one in (a, b)) / 2


def fewest(values, share):
    order = sorted(range(len(values)), key=lambda t: -float(values[t]))
    held, chosen = 0.0, set()
    for t in order:
        if held >= share * float(values.sum()):
            break
        chosen.add(t)
        held += float(values[t])
    return chosen


@claims
@given(
    sizes, st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=4)
)
def test_who_is_asked_are_the_last_queries_of_each_prompt(S, requests):
    """Wherever its blocks end, and whatever of it reads everything."""
    line = "minference(sinks=16, block=64, budget=160, last=50)"
    planner = Planner(Settings(policy=parse(line), shortcut=False), S)
    computed, queries = (np.array(each) for each in zip(*requests, strict=True))
    prompt = computed + queries + np.arange(len(requests)) % 2 * 30 - np.arange(len(requests)) // 2
    segments = planner.plan(computed, computed + queries, prompt)
    flat = np.cumsum(queries) - queries
    segments = segments.where(segments.selects & ~segments.decodes)
    if not len(segments.row):
        return
    found = Asking.of(segments, 64, lambda values, dtype: torch.as_tensor(values, dtype=dtype))
    for r, row in enumerate(dict.fromkeys(segments.row.tolist())):
        mine = np.flatnonzero(segments.row == row)
        assert found.run[mine].tolist() == [r] * len(mine)
        assert int(found.block[r]) == mine[-1]
        end = min(int(computed[row] + queries[row]), int(prompt[row]))
        count = min(64, end - int(segments.start[mine[0]]))
        assert (int(found.count[r]), int(found.seen[r])) == (count, end)
        positions = found.rows[r] - flat[row] + computed[row]
        assert positions[-count:].tolist() == list(range(end - count, end))
        assert set(positions[:-count].tolist()) <= {end - count}


def test_lots_are_the_same_however_a_prompt_is_chunked():
    policy, table = RandomPrefill(seed=3), torch.zeros(2, 30, dtype=torch.int32)
    pages = torch.tensor([20, 21], dtype=torch.int32)

    def shares(starts):
        blocks = QueryBlocks(query=torch.zeros(9, 4, 1, 8), bounds=torch.tensor([0, 4, 9]),
                             start=torch.tensor(starts), size=64, scale=1.0)  # fmt: skip
        return policy.score(blocks, None, None, table, pages)

    one, other = shares([640, 700]), shares([650, 703])
    assert torch.equal(one, other)
    torch.testing.assert_close(one.sum(-1), torch.ones(2, 4))
    assert (one[:, :, 21:] == 0).all()
    assert not torch.equal(one[0], one[1]), "a block has its own"
    assert not torch.equal(one[0, 0], one[0, 1]), "and a head"
    other = RandomPrefill(seed=4)
    assert str(other).endswith("seed=4)")


def test_what_blocks_may_read_is_counted_query_by_query():
    planner = Planner(Settings(policy=parse("random_prefill(sinks=16, budget=80, last=1)")), 16)
    segments = planner.plan(*step((0, 200, 200), (300, 30, 500)))
    reads = step_reads(segments, planner, [None, None]).prefill
    read = 0
    for positions, prompt in ((range(200), 200), (range(300, 330), 500)):
        for i in positions:  # 80 tokens hold the sinks and a whole block
            skipped = max(i // 64 * 4 - 1, 0) if i < prompt - 1 else 0
            read += i + 1 - 16 * skipped
    assert (reads.queries, reads.read) == (230, read)


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("xattention(threshold=0)", r"share above 0 and at most 1, or None, got 0; write"),
        ("xattention(threshold=1.5)", r"got 1\.5; write xattention\(threshold=0\.9\)"),
        ("xattention(stride=12)", r"divides a block of 64 queries, got 12; write xattention"),
        ("xattention(stride=True)", r"got True"),
        ("xattention(budget=100)", r"at least sinks \+ block = 192, .* got 100; raise it"),
        ("block_quest(budget=0.5)", r"block_quest: budget must be a number of tokens"),
        ("random_prefill(seed=-1)", r"seed must be .* got -1"),
        ("minference(vertical=10)", r"vertical must be .* at least 30, .* got 10; write minfer"),
        ("minference(slash=0.5)", r"slash must be .* at least 100, .* got 0\.5"),
        ("minference(threshold=0.9)", r"not a share: leave threshold out, or write flexprefill"),
        ("flexprefill(threshold=None)", r"write flexprefill\(threshold=0\.9\), or minference"),
        ("flexprefill(tau=2)", r"tau must be a distance between 0 and 1, got 2"),
        ("flexprefill(min_budget=0.1)", r"min_budget must be .* got 0\.1"),
        ("xattention + block_quest", r"both answer the stage 'generate'"),
    ],
)
def test_bad_input_is_refused_with_what_to_write(line, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse(line)


def test_a_stride_that_divides_no_page_is_refused():
    wanted = r"stride=32 does not divide a page of 16 tokens; write xattention\(stride=16\)"
    with pytest.raises(ValueError, match=wanted):
        Planner(Settings(policy=parse("xattention(stride=32)")), 16)
