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
def load_images(row, start, others, BP: tl.constexpr):
    p = start + tl.arange(0, BP)
    score = tl.load(row + p, mask=p < others, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0, 0.0, score)  # -0 is no less than 0
    return tl.where(p < others, flip(score.to(tl.int32, bitcast=True)), LOWEST)


@triton.jit
def weigh(images, top):
    score = flip(images).to(tl.float32, bitcast=True)
    return tl.where(images > LOWEST, tl.exp(tl.where(images > LOWEST, score, top) - top), 0.0)


@triton.jit
def count_from(first, row, others, threshold, BP: tl.constexpr):
    """How many images reach the threshold; `first` is the row's first tile."""
    count = tl.sum((first >= threshold).to(tl.int32))
    for start in range(BP, others, BP):
        count += tl.sum((load_images(row, start, others, BP) >= threshold).to(tl.int32))
    return count


@triton.jit
def mass_from(first, row, others, threshold, top, BP: tl.constexpr):
    """The softmax mass, not yet normalised, of the images that reach the threshold."""
    mass = tl.sum(tl.where(first >= threshold, weigh(first, top), 0.0))
    for start in range(BP, others, BP):
        images = load_images(row, start, others, BP)
        mass += tl.sum(tl.where(images >= threshold, weigh(images, top), 0.0))
    return mass


@triton.jit
def highest_image(first, row, others, BP: tl.constexpr):
    highest = tl.max(first)
    for start in range(BP, others, BP):
        highest = tl.maximum(highest, tl.max(load_images(row, start, others, BP)))
    return highest


@triton.jit
def middle(low, high):
    return (low & high) + ((low ^ high) >> 1)  # (low + high) // 2 without overflow


@triton.jit
def fewest(first, row, others, highest, top_p, BP: tl.constexpr):
    """How many pages, the last one counted in, it takes to reach top_p of the softmax."""
    last = tl.load(row + others)
    top = tl.maximum(
        tl.where(highest > LOWEST, flip(highest).to(tl.float32, bitcast=True), last), last
    )
    end = tl.exp(last - top)
    goal = top_p * (mass_from(first, row, others, LOWEST + 1, top, BP) + end) - end
    low = tl.full([], LOWEST + 1, tl.int32)  # the mass from here on reaches the goal
    high = tl.maximum(highest, low) + 1  # from here on it is 0
    while low + 1 < high:
        mid = middle(low, high)
        reached = mass_from(first, row, others, mid, top, BP) >= goal
        low = tl.where(reached, mid, low)
        high = tl.where(reached, high, mid)
    above = count_from(first, row, others, low + 1, BP)
    equals = count_from(first, row, others, low, BP) - above
    missing = goal - mass_from(first, row, others, low + 1, top, BP)
    each = weigh(low, top)
    wanted = tl.ceil(missing / tl.where(each > 0, each, 1.0))  # no page but the last: not a weight
    wanted = tl.where(each > 0, tl.minimum(wanted, equals), equals).to(tl.int32)
    return tl.where(goal > 0, 1 + above + wanted, 1)


@triton.jit
def page_select_kernel(
    scores, pages, keep, chosen, counts, H, scores_b, scores_h, width, top_p, minimum,
    TOP_P: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    row = scores + b * scores_b + h * scores_h
    sequence = b * H + h
    chosen += sequence * width
    count = tl.load(pages + b)
    others = count - 1  # the last page is taken unseen
    least = tl.minimum(count, minimum)
    taken = tl.maximum(tl.minimum(tl.minimum(tl.load(keep + b), count), width), least)
    first = load_images(row, 0, others, BP)
    highest = highest_image(first, row, others, BP)
    if TOP_P and others >= 0:
        taken = tl.minimum(
            taken, tl.maximum(least, fewest(first, row, others, highest, top_p, BP))
        )

    needed = taken - 1
    low = tl.full([], LOWEST, tl.int32)  # at least `needed` images reach it
    high = tl.maximum(highest, low + 1) + 1  # none does
    found = tl.where(needed > 0, tl.maximum(others, 0), needed)
    while (low + 1 < high) and (found != needed):
        mid = middle(low, high)
        reaching = count_from(first, row, others, mid, BP)
        enough = reaching >= needed
        low = tl.where(enough, mid, low)
        high = tl.where(enough, high, mid)
        found = tl.where(enough, reaching, found)
    equals = needed - count_from(first, row, others, low + 1, BP)  # how many at `low` are taken

    written = tl.full([], 0, tl.int32)
    passed = tl.full([], 0, tl.int32)
    for start in range(0, tl.where(needed > 0, others, 0), BP):
        images = load_images(row, start, others, BP)
        p = start + tl.arange(0, BP)
        equal = ((images == low) & (p < others)).to(tl.int32)
        rank = passed + tl.cumsum(equal, 0)
        mine = ((p < others) & ((images > low) | ((equal > 0) & (rank <= equals)))).to(tl.int32)
        at = written + tl.cumsum(mine, 0) - 1
        tl.store(chosen + at, p, mask=mine > 0)
        passed += tl.sum(equal)
        written += tl.sum(mine)

    for start in range(0, width, BW):
        k = start + tl.arange(0, BW)
        tl.store(chosen + k, tl.where(k == needed, others, 0), mask=(k >= needed) & (k < width))
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
) -> tuple[Tensor, Tensor]:
    B, H, P = scores.shape
    chosen = torch.empty(B, H, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(B, H, dtype=torch.int32, device=scores.device)
    if counts.numel():
        page_select_kernel[(B, H)](
            scores, pages, keep, chosen, counts, H, *scores.stride()[:2], width,
            1.0 if top_p is None else top_p, minimum, TOP_P=top_p is not None, **blocks(P),
        )  # fmt: skip
    return chosen, counts
