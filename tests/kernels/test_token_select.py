import math

import pytest
import torch

from kvplug_kernels.token_select import reference, token_select

INF, NAN = float("inf"), float("nan")


def mean_weights(logits, scored, scale):
    """logits [G][T], number of scored tokens -> mean softmax over G of each scored token."""
    weights = [0.0] * scored
    for row in logits:
        known = [-INF if math.isnan(x) else min(x * scale, 3e38) for x in row[:scored]]
        top = max(known, default=-INF)
        if top == -INF:
            continue
        each = [math.exp(x - top) for x in known]
        weights = [w + e / sum(each) / len(logits) for w, e in zip(weights, each, strict=True)]
    return weights


def plain(logits, length, S, keep, width, scale, top_p, sinks):
    """One KV head as the docstring defines it."""
    scored = max(length - 1, 0) // S * S
    weights = mean_weights(logits, scored, scale)
    order = sorted(range(scored), key=lambda t: (t >= sinks, -weights[t], t))
    least = min(length, S + sinks)
    count = max(min(keep, width, length), least) - (length - scored)
    if top_p is not None:
        goal = top_p * sum(weights)
        enough = (k for k in range(scored + 1) if sum(weights[t] for t in order[:k]) >= goal)
        count = min(count, max(next(enough, scored), least - (length - scored)))
    return sorted(order[:count]) + list(range(scored, length))


def check(logits, heads, lengths, S, keep, width, scale, top_p, sinks, chosen, counts):
    """Equal to the definition, or apart only in tokens of the same weight to six digits."""
    B, group = len(logits), logits.shape[1] // heads
    assert chosen.shape == (B, heads, width)
    for b in range(B):
        for h in range(heads):
            rows = logits[b, h * group : (h + 1) * group].tolist()
            length = int(lengths[b])
            wanted = plain(rows, length, S, int(keep[b]), width, scale, top_p, sinks)
            got = chosen[b, h, : counts[b, h]].tolist()
            assert counts[b, h] == len(wanted)
            assert got == sorted(set(got))
            assert not chosen[b, h, counts[b, h] :].any()
            weights = mean_weights(rows, max(length - 1, 0) // S * S, scale)
            apart = [weights[t] for t in {*got} ^ {*wanted}]
            assert all(math.isclose(x, apart[0], rel_tol=1e-5) for x in apart)
            assert got == wanted or max(weights) > 0


CASES = [
    # lengths, S, keep, sinks
    ([70, 0, 1, 16, 17], 16, [40, 9, 9, 3, 30], 0),
    ([333, 64, 65, 32], 32, [36, 90, 0, 64], 4),
    ([257], 16, [64], 20),
]


def problem(lengths, S, keep, heads, G, ties, device="cpu"):
    """Logits of every scored token; what is behind them, and in the newest page, is NaN."""
    T = (max(lengths) // S + 2) * S
    generator = torch.Generator().manual_seed(T + G)
    logits = torch.randn(len(lengths), heads * G, T, generator=generator) * 9
    if ties:
        logits = (logits / 9).round() * 9
    for b, length in enumerate(lengths):
        logits[b, :, max(length - 1, 0) // S * S :] = NAN
    integers = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, keep))
    return logits.to(device), *integers


@pytest.mark.parametrize("top_p", [None, 0.3137, 0.9031])
@pytest.mark.parametrize("G, ties", [(1, False), (1, True), (3, False), (4, True)])
@pytest.mark.parametrize("lengths, S, keep, sinks", CASES)
def test_reference_equals_sorting(lengths, S, keep, sinks, G, ties, top_p):
    logits, ends, most = problem(lengths, S, keep, 2, G, ties)
    rest = (2, ends, S, most, 72, 0.2, top_p, sinks)
    check(logits, *rest, *reference.token_select(logits, *rest))


@pytest.mark.parametrize("top_p", [None, 0.3137, 0.9031])
@pytest.mark.parametrize("G, ties", [(1, True), (3, False), (4, True)])
@pytest.mark.parametrize("lengths, S, keep, sinks", CASES)
def test_kernel_equals_sorting(
    lengths, S, keep, sinks, G, ties, top_p, device, poisoned_outputs, monkeypatch
):
    """In tiles of 64 tokens, so that a row is one to six of them."""
    from kvplug_kernels.token_select import kernel

    monkeypatch.setattr(kernel, "TILE", 64)
    monkeypatch.setattr(kernel, "MOST_TOKENS", 64)
    monkeypatch.setattr(kernel, "MOST_PARTS", 2)
    logits, ends, most = problem(lengths, S, keep, 2, G, ties, device)
    rest = (2, ends, S, most, 72, 0.2, top_p, sinks)
    check(logits, *rest, *token_select(logits, *rest))


def test_kernel_takes_infinite_and_missing_logits(device, poisoned_outputs):
    logits = torch.tensor([[[-INF, NAN, 1.0, -INF, INF, 0.0, NAN, NAN]]], device=device)
    lengths = torch.tensor([8], dtype=torch.int32, device=device)
    for keep, top_p in ((0, None), (3, None), (5, None), (8, None), (8, 0.5)):
        rest = (1, lengths, 2, torch.full_like(lengths, keep), 8, 1.0, top_p, 1)
        check(logits, *rest, *token_select(logits, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_kernel_equals_reference_on_long_rows(top_p):
    logits = torch.randn(3, 32, 32768, device="cuda") * 9
    lengths = torch.tensor([32768, 20001, 300], dtype=torch.int32, device="cuda")
    keep = torch.full_like(lengths, 2048)
    rest = (8, lengths, 16, keep, 2048, 0.3, top_p, 4)
    ours, theirs = token_select(logits, *rest), reference.token_select(logits, *rest)
    assert (ours[1] - theirs[1]).abs().max() <= (0 if top_p is None else 1)
    marks = [
        torch.zeros(3, 8, 32768, device="cuda").scatter_(2, chosen.long(), 1.0)
        for chosen, _ in (ours, theirs)
    ]
    assert ((marks[0] > 0) != (marks[1] > 0)).sum(2).max() <= 4  # of nearly the same weight


def test_everything_is_taken_when_the_budget_is_the_cache():
    logits, lengths, keep = problem([37, 8, 0], 8, [37, 8, 1], 1, 2, False)
    rest = (1, lengths, 8, keep, 40, 1.0, None, 0)
    chosen, counts = reference.token_select(logits, *rest)
    assert counts.flatten().tolist() == [37, 8, 0]
    assert chosen[0, 0].tolist() == [*range(37), 0, 0, 0]


def test_infinite_and_missing_logits():
    """A NaN counts as -inf, infinity as the largest number; all are tokens still."""
    logits = torch.tensor([[[-INF, NAN, 1.0, -INF, INF, 0.0, NAN, NAN]]])
    lengths = torch.tensor([8], dtype=torch.int32)
    for keep in range(9):
        rest = (1, lengths, 2, torch.full_like(lengths, keep), 8, 1.0, None, 0)
        check(logits, *rest, *reference.token_select(logits, *rest))


def test_wrong_knobs_say_what_they_wanted():
    logits, lengths = torch.zeros(1, 4, 32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"at least page_size \+ sinks = 20 tokens, got 19"):
        token_select(logits, 2, lengths, 16, lengths, 19, 1.0, sinks=4)
    with pytest.raises(ValueError, match=r"top_p must be above 0 and at most 1, got 1\.5"):
        token_select(logits, 2, lengths, 16, lengths, 32, 1.0, top_p=1.5)
    with pytest.raises(ValueError, match="a multiple of the 3 KV heads, got 4"):
        token_select(logits, 3, lengths, 16, lengths, 32, 1.0)
    with pytest.raises(ValueError, match="sinks must be at least 0 tokens, got -1"):
        token_select(logits, 2, lengths, 16, lengths, 32, 1.0, sinks=-1)
