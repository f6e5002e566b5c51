"""Softmax in parts, then weights, then one program per (request, KV head) that bisects for the
lowest weight that is taken and compacts. No sort.

A weight is no negative number, so its bits are an int32 in the order of the weights.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # logits that a program weighs at once
MOST_PARTS = 32  # of a row's softmax
MOST_TOKENS = 4096  # weights held in registers; the rest is read again at every halving
LOG2_E = math.log2(math.e)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
INFINITY = tl.constexpr(0x7F800000)  # its bits: no weight reaches them


@triton.jit
def scored_of(lengths, b, S: tl.constexpr):
    """Tokens before the newest page."""
    return tl.maximum(tl.load(lengths + b) - 1, 0) // S * S


@triton.jit
def load_logits(row, t, scored, scale):
    """In powers of two; NaN is -inf and infinity the largest number."""
    x = tl.load(row + t, mask=t < scored, other=float("-inf")) * scale
    return tl.where(x == x, tl.minimum(x, LARGEST), float("-inf"))


@triton.jit
def sum_kernel(
    logits, lengths, tops, totals, scale, logits_b, logits_h, Hq,
    S: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Of one part of a row: its largest logit, and the sum of the powers from there."""
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    scored = scored_of(lengths, b, S)
    share = tl.cdiv(tl.cdiv(scored, BT), PARTS) * BT
    row = logits + b * logits_b + head * logits_h
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, scored), BT):
        x = load_logits(row, start + tl.arange(0, BT), scored, scale)
        above = tl.maximum(top, tl.max(x))
        least = tl.where(above > float("-inf"), above, 0.0)
        total = total * tl.exp2(top - least) + tl.sum(tl.exp2(x - least))
        top = above
    at = (b * Hq + head) * PARTS + part
    tl.store(tops + at, top)
    tl.store(totals + at, total)


@triton.jit
def weigh_kernel(
    logits, lengths, tops, totals, weights, scale, logits_b, logits_h, H, T,
    G: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The mean share of a tile's tokens over the group."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    scored = scored_of(lengths, b, S)
    if tl.program_id(2) * BT >= scored:
        return
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    part = tl.arange(0, PARTS)
    weight = tl.zeros([BT], tl.float32)
    for g in range(G):
        head = h * G + g
        at = (b * H * G + head) * PARTS + part
        top = tl.load(tops + at)
        highest = tl.max(top)
        highest = tl.where(highest > float("-inf"), highest, 0.0)
        total = tl.sum(tl.load(totals + at) * tl.exp2(top - highest))
        x = load_logits(logits + b * logits_b + head * logits_h, t, scored, scale)
        weight += tl.exp2(x - highest) / (tl.where(total > 0, total, 1.0) * G)
    tl.store(weights + (b * H + h) * T + t, weight, mask=t < scored)


@triton.jit
def load_images(row, start, sinks, scored, BT: tl.constexpr):
    """Weights of the tokens that compete, as bits; negative for others."""
    t = start + tl.arange(0, BT)
    weight = tl.load(row + t, mask=(t >= sinks) & (t < scored), other=-1.0)
    return weight.to(tl.int32, bitcast=True)


@triton.jit
def count_and_weigh(images, threshold):
    reaching = images >= threshold
    weights = tl.where(reaching, images.to(tl.float32, bitcast=True), 0.0)
    return tl.sum(reaching.to(tl.int32)), tl.sum(weights)


@triton.jit
def from_threshold(first, row, sinks, scored, threshold, BT: tl.constexpr):
    """How many weights reach the threshold, and their sum; `first` is the row's first tile."""
    count, weight = count_and_weigh(first, threshold)
    for start in range(BT, scored, BT):
        more, weights = count_and_weigh(load_images(row, start, sinks, scored, BT), threshold)
        count += more
        weight += weights
    return count, weight


@triton.jit
def weigh_sinks(row, sinks, BW: tl.constexpr):
    weight = tl.full([], 0.0, tl.float32)
    for start in range(0, sinks, BW):
        t = start + tl.arange(0, BW)
        weight += tl.sum(tl.load(row + t, mask=t < sinks, other=0.0))
    return weight


@triton.jit
def choose_kernel(
    weights, lengths, keep, chosen, counts, H, T, width, top_p, sinks,
    S: tl.constexpr, TOP_P: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    sequence = b * H + tl.program_id(1)
    row = weights + sequence * T
    chosen += sequence * width
    length = tl.load(lengths + b)
    scored = scored_of(lengths, b, S)
    sinks = tl.minimum(sinks, scored)
    unseen = length - scored + sinks  # taken whatever they weigh
    least = tl.minimum(length, S + sinks) - unseen
    most = tl.minimum(tl.minimum(tl.load(keep + b), width), length) - unseen
    most = tl.maximum(most, least)

    first = load_images(row, 0, sinks, scored, BT)
    low = tl.full([], 0, tl.int32)  # the weights from here on are enough
    high = tl.full([], INFINITY, tl.int32)  # those from here on are not
    reaching, weight = from_threshold(first, row, sinks, scored, low, BT)
    beyond = tl.full([], 0, tl.int32)
    heavier = tl.full([], 0.0, tl.float32)
    goal = tl.full([], 0.0, tl.float32)
    takes = most > 0
    if TOP_P:
        sunk = weigh_sinks(row, sinks, BW)
        goal = top_p * (weight + sunk) - sunk
        takes &= (least > 0) | (goal > 0)
    while takes & (low + 1 < high) & (reaching > beyond + 1) & (TOP_P | (reaching != most)):
        middle = low + (high - low) // 2
        count, weight = from_threshold(first, row, sinks, scored, middle, BT)
        enough = count >= most
        if TOP_P:
            enough |= (count >= least) & (weight >= goal)
        low = tl.where(enough, middle, low)
        reaching = tl.where(enough, count, reaching)
        high = tl.where(enough, high, middle)
        beyond = tl.where(enough, beyond, count)
        heavier = tl.where(enough, heavier, weight)

    some = reaching - beyond  # of those in between: all, unless they are equals
    if low + 1 == high:
        some = tl.minimum(some, most - beyond)
        if TOP_P:
            each = tl.maximum(low.to(tl.float32, bitcast=True), SMALLEST)
            missing = tl.ceil(tl.minimum((goal - heavier) / each, 1.0 * T)).to(tl.int32)
            some = tl.minimum(some, tl.maximum(missing, least - beyond))
    some = tl.where(takes, some, 0)

    written = tl.full([], 0, tl.int32)
    passed = tl.full([], 0, tl.int32)
    for start in range(0, scored, BT):
        t = start + tl.arange(0, BT)
        images = load_images(row, start, sinks, scored, BT)
        between = ((images >= low) & (images < high)).to(tl.int32)
        rank = passed + tl.cumsum(between, 0)
        mine = (images >= high) | ((between > 0) & (rank <= some)) | (t < sinks)
        mine = mine.to(tl.int32)
        tl.store(chosen + written + tl.cumsum(mine, 0) - 1, t, mask=mine > 0)
        passed += tl.sum(between)
        written += tl.sum(mine)

    count = written + length - scored
    for start in range(0, width, BW):
        k = start + tl.arange(0, BW)
        newest = tl.where(k < count, scored + k - written, 0)
        tl.store(chosen + k, newest, mask=(k >= written) & (k < width))
    tl.store(counts + sequence, count)


def blocks(T: int) -> dict[str, int]:
    BT = min(MOST_TOKENS, triton.next_power_of_2(max(T, 16)))
    return {"BT": BT, "BW": 256, "num_warps": min(16, max(1, BT // 128))}


def parts_for(T: int) -> int:
    return min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(T, TILE)))


def token_select(
    logits: Tensor,
    heads: int,
    lengths: Tensor,
    page_size: int,
    keep: Tensor,
    width: int,
    scale: float,
    top_p: float | None,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    (B, Hq, T), S = logits.shape, page_size
    chosen = torch.empty(B, heads, width, dtype=torch.int32, device=logits.device)
    counts = torch.empty(B, heads, dtype=torch.int32, device=logits.device)
    if not counts.numel():
        return chosen, counts
    PARTS = parts_for(max(T, 1))
    sums = torch.empty(2, B, Hq, PARTS, dtype=torch.float32, device=logits.device)
    weights = torch.empty(B, heads, T, dtype=torch.float32, device=logits.device)
    rest = (scale * LOG2_E, *logits.stride()[:2])
    sum_kernel[(B, Hq, PARTS)](logits, lengths, *sums, *rest, Hq, S=S, PARTS=PARTS, BT=TILE)
    weigh_kernel[(B, heads, max(1, triton.cdiv(T, TILE)))](
        logits, lengths, *sums, weights, *rest, heads, T,
        G=Hq // heads, S=S, PARTS=PARTS, BT=TILE,
    )  # fmt: skip
    choose_kernel[(B, heads)](
        weights, lengths, keep, chosen, counts, heads, T, width,
        1.0 if top_p is None else top_p, sinks, S=S, TOP_P=top_p is not None, **blocks(T),
    )  # fmt: skip
    return chosen, counts
