"""The smallest budget that loses less than a bound on one's own text, measured in the engine.

A text is cut into n contexts of p tokens and a more. The engine computes the p as a prompt and is
fed the others as its answer, so that each is read from the cache as a policy left it. Of a context

    loss = mean over the answer's tokens but the first of  -log p (policy) + log p (dense)

in nats a token: pairs of the same token behind the same text, and n numbers that are held to be
independent. Budgets are tried from the largest down, each by a one-sided t test of

    the mean loss is not below the bound

over the n contexts, and the first for which that is not refuted at 5 % ends the walk; the one
before it is the answer. Tested in an order that was fixed before, no more than one text in twenty
leads to a budget that loses more than the bound, however many were tried: Maurer et al.,
"Multiple comparisons in drug clinical trials and preclinical assays", 1995; for what is chosen by
its risk Angelopoulos et al., "Learn then Test", https://arxiv.org/abs/2110.01052. It is a
statement of texts like the one that was read, and of prompts as long.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import ttest_1samp

from kvplug import parse, read_offer
from kvplug_evals.calibration.measure import contexts
from kvplug_evals.engines.interface import Engine, EngineOptions, MiB, Request
from kvplug_evals.engines.start import start_engine
from kvplug_evals.models.folder import AUTO, DTYPES, served_dtype, token_bytes
from kvplug_evals.scbench.documents import encoder
from kvplug_evals.sweep.results import write_whole
from kvplug_evals.sweep.settings import filled

CONFIDENCE = 0.95
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
DENSE = "dense"
BLOCK = 32
FEWEST = 5
"""Contexts: of fewer, what differs between them is hardly seen."""
Start = Callable[[str, str, EngineOptions], Engine]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured. Raises ValueError for what measures nothing."""

    line: str
    """A policy line with {budget}, {window}, {half} or {share} for what is to be found."""
    quality: float
    """The bound, in nats a token over dense."""
    shares: tuple[float, ...] = SHARES
    """Of a prompt's tokens, that are tried."""
    contexts: int = 16
    context: int = 2048
    """Tokens of a prompt."""
    answer: int = 64
    """Tokens that are fed behind it."""
    at_once: int = 4
    """Requests that are served together."""
    dtype: str = AUTO
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.quality < float("inf"):
            raise ValueError(
                f"--quality is a loss in nats a token that is allowed, above 0, got "
                f"{self.quality}; write 0.05"
            )
        if self.contexts < FEWEST:
            raise ValueError(
                f"--contexts must be at least {FEWEST}, as a bound is of the differences between "
                f"them, got {self.contexts}; write 16"
            )
        for name, least in (("context", 2 * BLOCK), ("answer", 2), ("at_once", 1), ("threads", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least {least}, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {self.dtype!r}")
        if "{" not in self.line:
            raise ValueError(
                f"--policy {self.line!r} leaves no budget to be found; write {{budget}} (tokens) "
                "or {share} (of the context) in its place, such as snapkv(budget={budget}), "
                "twilight(budget={share}) or streaming_llm(sinks=32, window={window})"
            )
        wrong = [share for share in self.shares if not 0 < share <= 1]
        if wrong or not self.shares:
            raise ValueError(
                f"--budget is a share of the context, above 0 and at most 1, got "
                f"{wrong[0] if wrong else 'none'}; write 0.25"
            )
        _ = self.lines

    @property
    def lines(self) -> list[tuple[float, str]]:
        """Shares and their policies, the largest first, none twice."""
        found: dict[str, float] = {}
        for share in sorted(self.shares):
            (line,) = filled(self.line, self.context, [share], BLOCK)
            found.setdefault(str(parse(line)), share)
        return [(share, line) for line, share in reversed(found.items())]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one line on one text."""

    policy: str
    share: float
    loss: float
    """Nats a token over dense, mean over contexts."""
    bound: float
    """Of that mean, at 95 % one-sided confidence."""
    read: float
    """Of the tokens that dense reads in a decode step, by kvplug's counters."""
    losses: list[float]
    """Of each context."""

    def meets(self, quality: float) -> bool:
        return self.bound < quality


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text as contexts of a model's tokens."""

    name: str
    sha256: str
    tokens: int
    cut: tuple[tuple[int, ...], ...]

    @property
    def said(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "tokens": self.tokens}


@dataclass(frozen=True, kw_only=True)
class Found:
    setting: Setting
    model: str
    engine: str
    text: Text
    dense: float
    """-log p of dense attention, in nats a token."""
    measured: list[Measured]
    """In the order in which they were tried."""
    held_out: tuple[Text, float, Measured] | None
    """Another text, dense's loss on it, and what was chosen on it."""

    @property
    def chosen(self) -> Measured | None:
        """The smallest that meets the bound; None where the largest does not."""
        meeting = [each for each in self.measured if each.meets(self.setting.quality)]
        return meeting[-1] if meeting else None

    def save(self, file: Path, environment: dict[str, Any]) -> None:
        """environment: of the run, such as its command and versions."""
        chosen = self.chosen
        assert chosen is not None
        data: dict[str, Any] = {
            "policy": chosen.policy, "loss": chosen.loss, "bound": chosen.bound,
            "confidence": CONFIDENCE, "dense_loss": self.dense, "model": self.model,
            "engine": self.engine, "setting": asdict(self.setting), "text": self.text.said,
            "measured": [asdict(each) for each in self.measured],
        }  # fmt: skip
        if self.held_out is not None:
            text, dense, there = self.held_out
            data["held_out"] = {"text": text.said, "dense_loss": dense, **asdict(there)}
        write_whole(file, json.dumps({**data, **environment}, indent=1) + "\n")


def read_text(text: str, name: str, model: str, setting: Setting) -> Text:
    """Raises ValueError where it is too short."""
    ids = encoder(model)(text).input_ids
    cut = contexts(ids, setting.contexts, setting.context + setting.answer, name)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Text(name=name, sha256=digest, tokens=len(ids), cut=tuple(map(tuple, cut)))


def find(
    engine: str,
    model: str,
    setting: Setting,
    text: Text,
    held_out: Text | None = None,
    told: Callable[[str], object] = lambda what: None,
    answered: Callable[[], object] = lambda: None,
    start: Start = start_engine,
) -> Found:
    """Walks down the budgets. told: called with each line that is begun, with ``starting`` before
    it where an engine is started for it. answered: called with each context that is done.

    Raises EngineError of what the engine says, and ValueError for a line that is none.
    """
    with _Serving(engine, model, setting, held_out is not None, told, answered, start) as serving:
        dense = serving.losses(DENSE, text)
        apart = serving.losses(DENSE, held_out) if held_out is not None else []
        measured: list[Measured] = []
        for share, line in setting.lines:
            measured.append(serving.measure(line, share, text, dense))
            if not measured[-1].meets(setting.quality):
                break
        found = Found(
            setting=setting, model=model, engine=engine, text=text, dense=mean(dense),
            measured=measured, held_out=None,
        )  # fmt: skip
        if held_out is None or found.chosen is None:
            return found
        there = serving.measure(found.chosen.policy, found.chosen.share, held_out, apart)
    return replace(found, held_out=(held_out, mean(apart), there))


class _Serving:
    """One engine for all lines where requests may choose among them, else one after the other."""

    def __init__(
        self,
        engine: str,
        model: str,
        setting: Setting,
        twice: bool,
        told: Callable[[str], object],
        answered: Callable[[], object],
        start: Start,
    ) -> None:
        self.name, self.model, self.setting = engine, model, setting
        self.told, self.answered, self.start = told, answered, start
        self.offer = shared(line for _, line in setting.lines)
        self.texts = 1 + twice
        self.serves: str | None = None
        self.engine: Engine | None = None

    def __enter__(self) -> _Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = self.serves = None

    def _serve(self, line: str) -> Engine:
        wanted = DENSE if self.offer else line
        if self.engine is None or self.serves != wanted:
            self._stop()
            self.told(f"starting {self.name} for {line}")
            self.engine = self.start(self.name, wanted, self.options)
            self.serves = wanted
        self.told(line)
        return self.engine

    @property
    def options(self) -> EngineOptions:
        setting = self.setting
        longest = setting.context + setting.answer + BLOCK
        dtype = served_dtype(Path(self.model), setting.dtype)
        # All contexts stay cached for the next line, and what runs has private blocks besides.
        held = self.texts * setting.contexts + setting.at_once
        size = held * (longest + 2 * BLOCK) * token_bytes(Path(self.model), dtype)
        return EngineOptions(
            model=self.model, max_model_len=longest, max_num_seqs=setting.at_once,
            block_size=BLOCK, dtype=dtype, threads=setting.threads,
            kv_cache_mib=max(64, size * 5 // 4 // MiB), **(self.offer or {}),
        )  # fmt: skip

    def losses(self, line: str, text: Text) -> list[float]:
        return self._run(line, text)[0]

    def measure(self, line: str, share: float, text: Text, dense: Sequence[float]) -> Measured:
        own, read = self._run(line, text)
        losses = [a - b for a, b in zip(own, dense, strict=True)]
        return Measured(
            policy=line, share=share, loss=mean(losses), bound=upper(losses), read=read,
            losses=losses,
        )  # fmt: skip

    def _run(self, line: str, text: Text) -> tuple[list[float], float]:
        """Loss of each context, and the share of the cache that was read."""
        setting, engine = self.setting, self._serve(line)
        found: list[float] = []
        cached = read = 0.0
        for start in range(0, len(text.cut), setting.at_once):
            requests = [
                Request(
                    key=str(start + number), prompt=list(each[: setting.context]),
                    forced=list(each[setting.context :]), scored=setting.answer - 1,
                    policy=line if self.offer and line != DENSE else None,
                )
                for number, each in enumerate(text.cut[start : start + setting.at_once])
            ]  # fmt: skip
            wave = engine.run(requests, lambda reply: self.answered())
            found += [mean(reply.losses) for reply in wave.replies]
            cached, read = cached + wave.cached, read + wave.read
        return found, read / cached if cached else 1.0


def shared(lines: Iterable[str]) -> dict[str, Any] | None:
    """What a dense server is told so that requests may choose all of those lines; None where they
    need servers of their own."""
    policies = [parse(line) for line in lines]
    allow = sorted({part.name for each in policies for one in each for part in one.parts})
    kept = [each.scored.budget for each in policies if each.scored is not None]
    offer: dict[str, Any] = {"allow": tuple(allow)}
    if kept:
        offer["max_budget"] = max(kept)
    try:
        offered = read_offer({"policy": DENSE, **offer}, environ={})
        for each in policies:
            offered.settings_for(str(each))
    except ValueError:  # says which of them serves alone, and why
        return None
    return offer


def upper(losses: Sequence[float]) -> float:
    """Of their mean, at 95 % one-sided confidence by Student's t."""
    if max(losses) == min(losses):
        return losses[0]
    test = ttest_1samp(losses, 0.0, alternative="less")
    return float(test.confidence_interval(CONFIDENCE).high)


def unmet(found: Found) -> str:
    """Why no budget was chosen, and what to write instead."""
    (tried,) = found.measured
    quality = found.setting.quality
    said = (
        f"no budget of {found.setting.line} stays below {quality} nats a token: {tried.policy}, "
        f"the largest that was tried, loses {tried.loss:.3f}, and up to {tried.bound:.3f} at "
        f"{CONFIDENCE:.0%} confidence"
    )
    if tried.loss < quality:
        return f"{said}; give a longer --text and more --contexts, which bring the bound down"
    return f"{said}; give a larger --budget, or another --policy"
