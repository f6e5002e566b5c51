"""Which: the tokens of a prompt that each KV head keeps, decided on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvplug.batch import Observed
from kvplug.compress import PromptKV, ScoredEviction
from kvplug_kernels.fp8 import widened

INFINITY = 0x7F800000  # the bits of an fp32: no score stands above them
RECENT, PROTECTED, SINK = INFINITY + 1, INFINITY + 2, INFINITY + 3


def keep_tokens(
    policy: ScoredEviction,
    prompt: PromptKV,
    keep: Tensor,
    width: int,
    protect: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """Positions that each KV head keeps of a prompt's whole pages, ascending.

    keep [B] int tokens of every head, or [B, H], at most ``width`` each, protect spans
    [first, last) that no head may evict -> [B, H, width] int64: the first min(keep, tokens in
    whole pages) count, the rest are 0.

    Sinks, protected spans and the recent window come first, then what scores highest, the lower
    position first among equals; NaN scores lowest. Where ``keep`` has no room for all that is
    never to go, sinks go before protected spans before the window, each from its own end: the
    first sinks, the first protected tokens, the most recent tokens. Nothing synchronises.

    With protected spans, of a request that is packed more than once, what is never to go comes
    before the rest, each in its own order: the next time it is known to stand there.

    Raises ValueError if the policy's score has another shape or dtype than it should.
    """
    B, T, H, _ = prompt.keys.shape
    repeated, start = (
        None if each is None else widened(each) for each in (prompt.repeated, prompt.first)
    )
    keys, values = widened(prompt.keys), widened(prompt.values)
    given = replace(prompt, keys=keys, values=values, repeated=repeated, first=start)
    score = policy.score(given)
    if score.shape != (B, H, T) or score.dtype is not torch.float32:
        raise ValueError(
            f"{policy.name}.score must return torch.float32 {[B, H, T]} (requests, KV heads, "
            f"tokens), got {score.dtype} {list(score.shape)}"
        )
    lengths = prompt.lengths.long()[:, None, None]
    candidates = lengths // prompt.page_size * prompt.page_size
    position = torch.arange(T, device=score.device)

    grade = ordered(score.nan_to_num(float("-inf"), float("inf"), float("-inf")))
    recent = position >= lengths - policy.window
    grade = grade.masked_fill(recent, RECENT)
    for first, last in protect:
        grade = grade.masked_fill((first <= position) & (position < last), PROTECTED)
    grade = grade.masked_fill(position < policy.sinks, SINK)
    grade = grade.masked_fill(position >= candidates, -INFINITY - 1)
    place = torch.where(grade == RECENT, position, -position)

    best = ((grade << 32) + place).topk(min(width, T)).indices
    count = keep.long().view(B, -1, 1).minimum(candidates)
    unused = torch.arange(best.shape[2], device=best.device) >= count
    if protect and policy.every is not None:
        best = best + T * (grade.gather(2, best) < PROTECTED)
        kept = best.masked_fill(unused, 2 * T).sort().values
        kept = torch.where(kept < 2 * T, kept % T, T)
    else:
        kept = best.masked_fill(unused, T).sort().values
    return pad(kept.masked_fill(kept == T, 0), (0, width - best.shape[2]))


def ordered(score: Tensor) -> Tensor:
    """fp32 without NaN -> int64 in the same order, infinities at plus and minus INFINITY."""
    bits = score.view(torch.int32).long()
    return torch.where(bits < 0, -(1 << 31) - bits, bits)  # a float is a sign and a magnitude


def window_queries(seen: Observed, query: Tensor, window: Tensor | None) -> Tensor:
    """A prompt's window with what a step computed of it; bfloat16 of queries of eight bits.

    query [N, Hq, D] -> [W, Hq, D]
    """
    picked = widened(query[seen.tokens])
    if window is None:
        window = picked.new_zeros(seen.window, *query.shape[1:])
    window[seen.offset : seen.offset + len(picked)] = picked
    return window
