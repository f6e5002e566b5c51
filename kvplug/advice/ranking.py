"""Lines by what they gain at a class of quality, and what to type for the best one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvplug.advice.bounds import Bounds, Setup, Traffic, bounds
from kvplug.advice.model import Model
from kvplug.advice.published import ENGINE_FP8, Quality, in_class, quality_of
from kvplug.composition import Composition
from kvplug.config import DEFAULT_MIN_CONTEXT
from kvplug.grammar import parse
from kvplug.offer import Offer, read_offer

WORTH = 1.1
"""A bound that promises less is eaten up by what choosing and scheduling cost."""
DENSE = "dense"


def usual_lines(prompt: int) -> list[str]:
    """Those that were measured, at the shares that they were measured at, for such prompts."""
    quarter = max(256, round(prompt * 0.26 / 64) * 64)
    read = max(1024, round(prompt * 0.172 / 64) * 64)
    return [
        "twilight(budget=0.0625)",
        "twilight(budget=0.15625)",
        f"xattention(threshold=None, budget={read}) + twilight(budget=0.0625)",
        f"xattention(threshold=None, budget={read})",
        "quest(budget=0.21875)",
        "quest(budget=0.125)",
        f"snapkv(budget={quarter})",
        f"snapkv(budget={quarter}) + quest(budget={quarter // 2})",
        f"pyramid(snapkv(budget={quarter}))",
        f"keydiff(budget={quarter})",
        f"streaming_llm(sinks=32, window={quarter - 32})",
    ]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one choice gives."""

    policy: str
    bounds: Bounds
    gain: float
    """Its tokens a second over dense's; 0 where dense serves none and it does neither."""
    quality: Quality
    qualifies: bool
    """Whether its quality was published and is in the class."""
    crowded: bool
    """Whether it has no room for requests that dense holds all: each would push another's cached
    prompt out, which was measured to cost more than reading less gives (``serve-4k-cpu.txt``)."""

    @property
    def ours(self) -> bool:
        return self.policy not in (DENSE, ENGINE_FP8)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All lines, and the one to take; None where kvplug gains nothing."""

    dense: Line
    lines: list[Line]
    """The others, first those that qualify, by gain."""
    best: Line | None
    left_out: list[tuple[str, str]]
    """Lines that the model is not served under, and why."""
    notes: list[str]


def advise(
    model: Model,
    setup: Setup,
    traffic: Traffic,
    quality: str = "close",
    lines: Sequence[str] = (),
) -> Advice:
    """lines: policies beside the usual ones. Raises ValueError for what is no policy line."""
    dense = _line(model, setup, traffic, DENSE, quality, None)
    found, left_out = [], []
    for policy in dict.fromkeys([*lines, *usual_lines(traffic.prompt)]):
        reason = model.refused or unserved(model, parse(policy))
        if reason:
            left_out.append((policy, reason))
            continue
        try:
            found.append(_line(model, setup, traffic, policy, quality, dense))
        except ValueError as error:
            left_out.append((policy, str(error)))
    if setup.pace is None:
        found.append(_line(model, setup, traffic, ENGINE_FP8, quality, dense))
    else:
        left_out.append((ENGINE_FP8, f"its steps are not in {setup.pace.source}"))
    found.sort(key=lambda line: (not line.qualifies, -line.gain))
    ours = [x for x in found if x.ours and x.qualifies and x.gain >= WORTH and not x.crowded]
    best = max(ours, key=lambda line: line.gain, default=None)
    return Advice(
        dense=dense, lines=found, best=best, left_out=left_out,
        notes=list(_notes(model, traffic, dense, found, best)),
    )  # fmt: skip


def _line(
    model: Model, setup: Setup, traffic: Traffic, policy: str, quality: str, dense: Line | None
) -> Line:
    fp8 = policy == ENGINE_FP8
    found = bounds(model, setup, traffic, _offer(DENSE if fp8 else policy), 1 if fp8 else None)
    answers = quality_of(policy, traffic.prompt)
    gain = 1.0
    if dense is not None:
        before = dense.bounds.rate
        gain = found.rate / before if before else (float("inf") if found.rate else 0.0)
    qualifies = dense is None or (
        in_class(answers, quality) and (answers.measured or quality == "any")
    )
    crowded = dense is not None and found.at_once < dense.bounds.at_once == traffic.at_once
    return Line(
        policy=policy, bounds=found, gain=gain, quality=answers, qualifies=qualifies,
        crowded=crowded,
    )  # fmt: skip


def _offer(policy: str) -> Offer:
    return read_offer({"policy": policy}, environ={})


def unserved(model: Model, policy: Composition) -> str | None:
    """Why the engines would refuse the line for the model, as far as its shape says."""
    scored = policy.scored
    if any(not layer.owns for layer in model.attention):
        if not policy.uniform or (scored is not None and scored.needs_queries):
            return "some of the model's layers share a cache"
        if policy.local is not None:
            return "some of the model's layers share a cache"
    if model.sinks and policy.generate is not None and policy.generate.name == "xattention":
        return "the model has attention sinks"
    if policy.format is not None:
        return _uncoded(model)
    if not model.planned and policy.plans:
        return "every layer of the model sees a window and no more"
    return None


def _uncoded(model: Model) -> str | None:
    """Why no pages of the model are kept in a format."""
    for what, has in (
        ("recurrent layers", any(layer.state for layer in model.layers)),
        ("layers that see a window", any(layer.window for layer in model.attention)),
        ("layers that share a cache", any(not layer.owns for layer in model.attention)),
        ("attention sinks", model.sinks),
    ):
        if has:
            return f"the model has {what}"
    return None


def _notes(
    model: Model, traffic: Traffic, dense: Line, lines: list[Line], best: Line | None
) -> Iterator[str]:
    if model.longest and traffic.tokens > model.longest:
        yield (
            f"the model was made for {model.longest:,} tokens, and a request has "
            f"{traffic.tokens:,}"
        )
    if model.estimated:
        yield "weights were reckoned from shapes; name a folder that has them"
    if not dense.bounds.capacity.exact:
        yield (
            "beside recurrent layers vLLM fits blocks to their states: requests at once are a "
            "ratio of bytes here"
        )
    if dense.bounds.at_once < traffic.at_once:
        yield f"dense holds {dense.bounds.at_once} of {traffic.at_once} requests at once"
    if traffic.prompt <= DEFAULT_MIN_CONTEXT:
        yield (
            f"prompts of up to {DEFAULT_MIN_CONTEXT:,} tokens are little of a step in a measured "
            "engine: kvplug's own default leaves them dense"
        )
    if best is not None and (found := best.quality.loss or best.quality.found) is not None:
        yield (
            f"its quality was measured at {found.tokens:,} tokens on {found.model}; measure it "
            "on your own traffic (kvplug eval)"
        )
    crowded = [line for line in lines if line.crowded and line.qualifies and line.gain >= WORTH]
    for line in crowded:
        yield (
            f"{line.policy} has room for {line.bounds.at_once} of {traffic.at_once} requests, and "
            "dense for all: they would push each other's cached prompts out"
        )
    for line in lines:
        if best is None and line.policy == ENGINE_FP8 and line.gain >= WORTH:
            yield f"vLLM's own --kv-cache-dtype fp8 gains {line.gain:.2f} without kvplug"


def commands(model: str, policy: str, setup: Setup, traffic: Traffic, ranks: int) -> list[str]:
    """What starts a server, in vLLM and in SGLang."""
    vllm = ["vllm", "serve", model, "--max-model-len", str(traffic.tokens)]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", model]
    sglang += ["--context-length", str(traffic.tokens)]
    if ranks > 1:
        vllm += ["--tensor-parallel-size", str(ranks)]
        sglang += ["--tp", str(ranks)]
    if policy == ENGINE_FP8:
        return [shlex.join([*vllm, "--kv-cache-dtype", "fp8"])]
    vllm += ["--block-size", str(setup.block_size), "--attention-backend", "kvplug"]
    vllm += ["--additional-config", json.dumps({"kvplug": {"policy": policy}})]
    sglang += ["--attention-backend", "kvplug", "--kvplug-policy", policy]
    return [shlex.join(vllm), shlex.join(sglang)]
