import math

import pytest
import torch

from kvplug_kernels.page_select import page_select, reference


def plain(scores, pages, keep, width, top_p, minimum, sinks=0, newest=1):
    """One row as the docstring defines it, by sorting."""
    least = min(minimum, pages)
    most = max(min(keep, pages, width), least)
    ends = min(max(newest, 1), most)
    certain = [*range(pages - 1, pages - 1 - ends, -1)]
    certain += range(min(sinks, pages - ends, most - ends))
    order = certain + sorted({*range(pages)} - {*certain}, key=lambda p: (-scores[p], p))
    count = most
    if top_p is not None and pages:
        top = max(scores[:pages])
        mass = [math.exp(scores[p] - top) for p in order]
        enough = (k for k in range(1, pages + 1) if sum(mass[:k]) >= top_p * sum(mass))
        count = min(most, max(next(enough, pages), least, len(certain)))
    return sorted(order[:count])


def check(scores, pages, keep, width, top_p, minimum, chosen, counts, sinks=0, newest=None):
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            expected = plain(
                scores[b, h].tolist(), int(pages[b]), int(keep[b]), width, top_p, minimum, sinks,
                1 if newest is None else int(newest[b]),
            )  # fmt: skip
            assert counts[b, h] == len(expected)
            assert chosen[b, h].tolist() == expected + [0] * (width - len(expected))


def test_everything_is_chosen_when_the_budget_is_the_cache():
    pages = torch.tensor([9, 0, 4], dtype=torch.int32)
    chosen, counts = reference.page_select(torch.randn(3, 2, 9), pages, pages, 9)
    assert counts[:, 0].tolist() == [9, 0, 4]
    assert chosen[2, 1].tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("top_p", [None, 0.6, 0.97])
@pytest.mark.parametrize("P, width", [(1, 3), (33, 8), (70, 70)])
@pytest.mark.parametrize("ties", [False, True])
def test_kernel_equals_sorting(P, width, top_p, ties, device, poisoned_outputs, monkeypatch):
    """In tiles of 32 pages, so that 33 pages are two of them and 70 three."""
    from kvplug_kernels.page_select import kernel

    monkeypatch.setattr(kernel, "MOST_PAGES", 32)
    generator = torch.Generator().manual_seed(P)
    scores = torch.randn(3, 2, P + 1, generator=generator).to(device)[:, :, :P] * 2
    if ties:
        scores = scores.round()
    pages = torch.tensor([P, 0, max(1, P - 2)], dtype=torch.int32, device=device)
    keep = torch.tensor([width + 3, 5, 1], dtype=torch.int32, device=device)
    for b, valid in enumerate(pages.tolist()):
        scores[b, :, valid:] = float("nan")
    chosen, counts = page_select(scores, pages, keep, width, top_p, minimum=2 if P > 1 else 1)
    check(scores.cpu(), pages, keep, width, top_p, 2 if P > 1 else 1, chosen, counts)


@pytest.mark.parametrize("top_p", [None, 0.6, 0.97])
@pytest.mark.parametrize("P, width, keep, sinks", [(70, 70, 40, 3), (33, 8, 9, 40), (9, 5, 1, 2)])
def test_kernel_takes_the_first_and_the_newest(
    P, width, keep, sinks, top_p, device, poisoned_outputs, monkeypatch
):
    """As far as they go: what is kept, the newest before the first, then what scores highest."""
    from kvplug_kernels.page_select import kernel

    monkeypatch.setattr(kernel, "MOST_PAGES", 32)
    scores = torch.randn(4, 2, P, generator=torch.Generator().manual_seed(P)).to(device) * 2
    pages, keep, newest = (
        torch.tensor(each, dtype=torch.int32, device=device)
        for each in ([P, 0, P - 2, 5], [keep] * 4, [4, 2, 0, 9])
    )
    for b, valid in enumerate(pages.tolist()):
        scores[b, :, valid:] = float("nan")
    chosen = page_select(scores, pages, keep, width, top_p, sinks=sinks, newest=newest)
    check(scores.cpu(), pages, keep, width, top_p, 1, *chosen, sinks, newest)


def test_shares_are_taken_while_those_before_fall_short():
    """Scored by their logarithms. The newest two and the first have .35 of it."""
    shares = torch.tensor([[[0.05, 0.3, 0.0, 0.25, 0.1, 0.2, 0.1]]])
    pages, newest = torch.tensor([7], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    for threshold, taken in ((0.3, []), (0.34, []), (0.36, [1]), (0.64, [1]), (0.66, [1, 3])):
        chosen, counts = page_select(
            shares.log(), pages, pages, 7, top_p=threshold, sinks=1, newest=newest
        )
        assert chosen[0, 0, : counts[0, 0]].tolist() == [0, *taken, 5, 6]


def test_kernel_takes_infinite_and_missing_scores(device, poisoned_outputs):
    """A NaN counts as -inf; both are pages still."""
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[[-inf, nan, 1.0, -inf, inf, 0.0]]], device=device)
    pages = torch.tensor([6], dtype=torch.int32, device=device)
    for keep in (1, 2, 4, 6):
        args = (scores, pages, torch.full_like(pages, keep), 6)
        for ours, theirs in zip(page_select(*args), reference.page_select(*args), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_kernel_equals_reference_on_long_rows(top_p):
    torch.manual_seed(0)
    scores = torch.randn(4, 8, 16000, device="cuda") * 3
    pages = torch.tensor([16000, 4097, 4096, 300], dtype=torch.int32, device="cuda")
    keep = torch.full_like(pages, 256)
    ours = page_select(scores, pages, keep, 256, top_p)
    theirs = reference.page_select(scores, pages, keep, 256, top_p)
    agree = ours[1] == theirs[1]
    assert torch.equal(ours[0][agree], theirs[0][agree])
    if top_p is None:
        assert agree.all()
    else:  # sums in another order may reach top_p a page sooner or later
        assert (ours[1] - theirs[1]).abs().max() <= 1


def test_wrong_knobs_say_what_they_wanted():
    scores, pages = torch.zeros(1, 1, 4), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="minimum must be between 1 and width = 4 pages, got 5"):
        page_select(scores, pages, pages, 4, minimum=5)
    with pytest.raises(ValueError, match=r"top_p must be above 0 and at most 1, got 1\.5"):
        page_select(scores, pages, pages, 4, top_p=1.5)
    with pytest.raises(ValueError, match="sinks must be at least 0 pages, got -1"):
        page_select(scores, pages, pages, 4, sinks=-1)
    with pytest.raises(ValueError, match=r"newest must be \[B=1\], got \[2\]"):
        page_select(scores, pages, pages, 4, newest=pages.repeat(2))
    with pytest.raises(ValueError, match="keep must be int32, got int64"):
        page_select(scores, pages, pages.long(), 4)
