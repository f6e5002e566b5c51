"""One program per (request, KV head): bisect for the lowest score that is taken, then compact.

Scores are compared as int32 images that keep their order, so that bisection ends after at most 32
halvings, and mostly once as many pages as are needed lie above the middle. No sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PAGES = 4096  # scores held in registers; the rest of a row is read again at every halving
LOWEST = tl.constexpr(-(2**31))  # below the image of -inf: not a page


@triton.jit
def flip(bits):
    """Bits of a float <-> int32 in the order of the floats; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_images(row, start, begins, others, BP: tl.constexpr):
    """Of the pages that compete, those from begins to others."""
    p = start + tl.arange(0, BP)
    competes = (p >= begins) & (p < others)
    score = tl.load(row + p, mask=competes, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0, 0.0, score)  # -0 is no less than 0
    return tl.where(competes, flip(score.to(tl.int32, bitcast=True)), LOWEST)


@triton.jit
def weigh(images, top):
    score = flip(images).to(tl.float32, bitcast=True)
    return tl.where(images > LOWEST, tl.exp(tl.where(images > LOWEST, score, top) - top), 0.0)


@triton.jit
def count_from(first, row, begins, others, threshold, BP: tl.constexpr):
    """How many images reach the threshold; `first` is the row's first tile."""
    count = tl.sum((first >= threshold).to(tl.int32))
    for start in range(BP, others, BP):
        count += tl.sum((load_images(row, start, begins, others, BP) >= threshold).to(tl.int32))
    return count


@triton.jit
def mass_from(first, row, begins, others, threshold, top, BP: tl.constexpr):
    """The softmax mass, not yet normalised, of the images that reach the threshold."""
    mass = tl.sum(tl.where(first >= threshold, weigh(first, top), 0.0))
    for start in range(BP, others, BP):
        images = load_images(row, start, begins, others, BP)
        mass += tl.sum(tl.where(images >= threshold, weigh(images, top), 0.0))
    return mass


@triton.jit
def highest_image(first, row, begins, others, BP: tl.constexpr):
    highest = tl.max(first)
    for start in range(BP, others, BP):
        highest = tl.maximum(highest, tl.max(load_images(row, start, begins, others, BP)))
    return highest


@triton.jit
def middle(low, high):
    return (low & high) + ((low ^ high) >> 1)  # (low + high) // 2 without overflow


@triton.jit
def highest_of(row, start, stop, BW: tl.constexpr):
    highest = tl.full([], float("-inf"), tl.float32)
    for tile in range(start, stop, BW):
        p = tile + tl.arange(0, BW)
        scores = tl.load(row + p, mask=p < stop, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(scores))
    return highest


@triton.jit
def mass_of(row, start, stop, top, BW: tl.constexpr):
    mass = tl.full([], 0.0, tl.float32)
    for tile in range(start, stop, BW):
        p = tile + tl.arange(0, BW)
        mass += tl.sum(tl.exp(tl.load(row + p, mask=p < stop, other=float("-inf")) - top))
    return mass


@triton.jit
def fewest(
    first, row, begins, others, count, highest, top_p, BP: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """How many pages, those that do not compete counted in, it takes to reach top_p of the
    softmax."""
    top = flip(highest).to(tl.float32, bitcast=True)
    top = tl.where(highest > LOWEST, top, float("-inf"))
    top = tl.maximum(top, highest_of(row, 0, begins, BW))
    top = tl.maximum(top, highest_of(row, others, count, BW))
    certain = mass_of(row, 0, begins, top, BW) + mass_of(row, others, count, top, BW)
    goal = top_p * (mass_from(first, row, begins, others, LOWEST + 1, top, BP) + certain) - certain
    low = tl.full([], LOWEST + 1, tl.int32)  # the mass from here on reaches the goal
    high = tl.maximum(highest, low) + 1  # from here on it is 0
    while low + 1 < high:
        mid = middle(low, high)
        reached = mass_from(first, row, begins, others, mid, top, BP) >= goal
        low = tl.where(reached, mid, low)
        high = tl.where(reached, high, mid)
    above = count_from(first, row, begins, others, low + 1, BP)
    equals = count_from(first, row, begins, others, low, BP) - above
    missing = goal - mass_from(first, row, begins, others, low + 1, top, BP)
    each = weigh(low, top)
    wanted = tl.ceil(missing / tl.where(each > 0, each, 1.0))  # where nobody competes: no weight
    wanted = tl.where(each > 0, tl.minimum(wanted, equals), equals).to(tl.int32)
    return begins + count - others + tl.where(goal > 0, above + wanted, 0)


@triton.jit
def page_select_kernel(
    scores, pages, keep, newest, chosen, counts, H, scores_b, scores_h, width, top_p, minimum,
    sinks, NEWEST: tl.constexpr, TOP_P: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    row = scores + b * scores_b + h * scores_h
    sequence = b * H + h
    chosen += sequence * width
    count = tl.load(pages + b)
    least = tl.minimum(count, minimum)
    taken = tl.maximum(tl.minimum(tl.minimum(tl.load(keep + b), count), width), least)
    ends = tl.minimum(tl.maximum(tl.load(newest + b), 1) if NEWEST else 1, taken)
    others = count - ends  # from here on, and before begins, pages are taken unseen
    begins = tl.minimum(tl.minimum(sinks, others), taken - ends)
    least = tl.maximum(least, begins + ends)
    first = load_images(row, 0, begins, others, BP)
    highest = highest_image(first, row, begins, others, BP)
    if TOP_P and count > 0:
        wanted = fewest(first, row, begins, others, count, highest, top_p, BP, BW)
        taken = tl.minimum(taken, tl.maximum(least, wanted))

    needed = taken - begins - ends
    low = tl.full([], LOWEST, tl.int32)  # at least `needed` images reach it
    high = tl.maximum(highest, low + 1) + 1  # none does
    found = tl.where(needed > 0, others - begins, needed)
    while (low + 1 < high) and (found != needed):
        mid = middle(low, high)
        reaching = count_from(first, row, begins, others, mid, BP)
        enough = reaching >= needed
        low = tl.where(enough, mid, low)
        high = tl.where(enough, high, mid)
        found = tl.where(enough, reaching, found)
    above = count_from(first, row, begins, others, low + 1, BP)
    equals = needed - above  # how many at `low` are taken

    written = tl.full([], 0, tl.int32)
    passed = tl.full([], 0, tl.int32)
    for start in range(0, tl.where(needed > 0, others, begins), BP):
        images = load_images(row, start, begins, others, BP)
        p = start + tl.arange(0, BP)
        equal = ((images == low) & (images > LOWEST)).to(tl.int32)
        rank = passed + tl.cumsum(equal, 0)
        best = (images > low) | ((equal > 0) & (rank <= equals))
        mine = ((best & (needed > 0)) | (p < begins)).to(tl.int32)
        at = written + tl.cumsum(mine, 0) - 1
        tl.store(chosen + at, p, mask=mine > 0)
        passed += tl.sum(equal)
        written += tl.sum(mine)

    for start in range(0, width, BW):
        k = start + tl.arange(0, BW)
        last = tl.where(k < taken, count - taken + k, 0)
        tl.store(chosen + k, last, mask=(k >= taken - ends) & (k < width))
    tl.store(counts + sequence, taken)


def blocks(P: int) -> dict[str, int]:
    BP = min(MOST_PAGES, triton.next_power_of_2(max(P, 16)))
    return {"BP": BP, "BW": 256, "num_warps": min(16, max(1, BP // 256))}


def page_select(
    scores: Tensor,
    pages: Tensor,
    keep: Tensor,
    width: int,
    top_p: float | None = None,
    minimum: int = 1,
    sinks: int = 0,
    newest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, H, P = scores.shape
    chosen = torch.empty(B, H, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(B, H, dtype=torch.int32, device=scores.device)
    if counts.numel():
        page_select_kernel[(B, H)](
            scores, pages, keep, keep if newest is None else newest, chosen, counts, H,
            *scores.stride()[:2], width, 1.0 if top_p is None else top_p, minimum, sinks,
            NEWEST=newest is not None, TOP_P=top_p is not None, **blocks(P),
        )  # fmt: skip
    return chosen, counts
