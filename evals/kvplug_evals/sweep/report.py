"""report.md: what each policy cost in answers, against dense on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from kvplug_evals.engines.stock import is_stock
from kvplug_evals.sweep.results import Result, refusals, results
from kvplug_evals.sweep.settings import budget_of
from kvplug_evals.sweep.stats import Difference, paired, summary

SIGNAL = 0.5
"""Dense accuracy below which a task says nothing of a policy."""
SAVED = 0.99
"""A row that read and held at least this share of dense is dense."""
MiB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Line:
    """A policy on a task, beside dense."""

    result: Result
    task: str
    means: dict[str, Any]
    dense: dict[str, Any]
    accuracy: Difference | None
    loss: Difference | None
    beyond_random: Difference | None
    """Its loss less that of random with the same budget."""

    @property
    def source(self) -> str:
        return self.result.source(self.task)

    @property
    def is_dense(self) -> bool:
        return self.result.policy == "dense"

    @property
    def signal(self) -> bool:
        return float(self.dense["fixed"]) >= SIGNAL

    @property
    def held(self) -> float | None:
        return _share(self.means.get("held_bytes"), self.dense.get("held_bytes"))

    @property
    def read(self) -> float | None:
        return _share(self.means.get("read_per_step"), self.dense.get("read_per_step"))

    @property
    def saves(self) -> bool | None:
        """None where neither was counted, as of a wave that a kill cut short."""
        told = [share for share in (self.held, self.read) if share is not None]
        return min(told) < SAVED if told else None

    @property
    def verdict(self) -> str:
        if self.is_dense:
            return "" if self.signal else "no signal"
        if self.saves is None:
            return "not counted"
        if not self.saves:
            return "= dense"
        return "" if self.signal else "no signal"


def _share(value: float | None, dense: float | None) -> float | None:
    return value / dense if value is not None and dense else None


def lines(peers: Sequence[Result], task: str) -> list[Line]:
    """Dense first, then by bytes held, then read."""
    here = [r for r in peers if r.of_task(task)]
    dense = next((r for r in here if r.policy == "dense"), None)
    if dense is None:
        return []
    base = dense.of_task(task)
    random = {budget_of(r.policy): r.of_task(task) for r in here if is_random(r.policy)}
    made = [
        Line(
            result=result,
            task=task,
            means=summary(result.of_task(task))[task],
            dense=summary(base)[task],
            accuracy=paired(result.of_task(task), base, "fixed"),
            loss=paired(result.of_task(task), base, "loss"),
            beyond_random=paired(
                result.of_task(task), random.get(budget_of(result.policy), []), "loss"
            ),
        )
        for result in here
    ]
    return sorted(
        made, key=lambda r: (not r.is_dense, -(r.held or 1), -(r.read or 1), r.result.policy)
    )


def tables(found: Sequence[Result]) -> Iterator[tuple[str, list[Line]]]:
    """Task and lines of each group of peers: of one setting, but for the policy."""
    for _, group in groupby(sorted(found, key=_order), key=_order):
        peers = list(group)
        for task in dict.fromkeys(row["task"] for r in peers for row in r.rows):
            made = lines(peers, task)
            if made:
                yield task, made


def figures(out: Path) -> list[dict[str, Any]]:
    """The tables of a directory as data. Raises ValueError if there is none."""
    return [_figures(line) for _, made in tables(results(out)) for line in made]


def _figures(line: Line) -> dict[str, Any]:
    suite, tokens, mode, question = line.result.place
    differences = {
        name: None if value is None else asdict(value)
        for name, value in (
            ("accuracy", line.accuracy), ("loss", line.loss),
            ("loss_beyond_random", line.beyond_random),
        )
    }  # fmt: skip
    return {
        "policy": line.result.policy, "task": line.task, "source": line.source, "suite": suite,
        "tokens": tokens, "mode": mode, "question": question, "engine": line.result.engine,
        "model": line.result.config["model"], "means": line.means, "of_dense": differences,
        "held_of_dense": line.held, "read_of_dense": line.read, "verdict": line.verdict,
    }  # fmt: skip


def _order(result: Result) -> tuple[Any, ...]:
    return result.place, result.peers


HEAD = (
    "policy",
    "accuracy",
    "Δ dense [95 %]",
    "compat",
    "Δ loss [95 %]",
    "Δ loss to random",
    "agrees",
    "KV held",
    "vs dense",
    "read/step",
    "vs dense",
    "cached, turn 1 / later",
    "TTFT",
    "TPOT",
    "",
)


def write_report(out: Path, plots: Sequence[Path]) -> Path:
    """Raises ValueError if nothing is finished."""
    file = out / "report.md"
    file.write_text(report(out, [plot.name for plot in plots]))
    return file


def report(out: Path, plots: Sequence[str]) -> str:
    """``plots`` are files beside it. Raises ValueError if nothing is finished."""
    found = results(out)
    text = [f"# {', '.join(sorted({r.place[0] for r in found}))}: what policies cost in answers"]
    text += ["", *_preface(found)]
    apart = differing(found)
    for policy, reason in refusals(out).items():
        text += ["", f"Left out, since the engine refused it: `{policy}`. {reason}"]
    for plot in plots:
        text += ["", f"![{Path(plot).stem}]({plot})"]
    for task, made in tables(found):
        source, result = made[0].source, made[0].result
        suite, tokens, mode, question = result.place
        title = f"## {task}, {tokens:,} tokens, {mode}, {_question(question)}, {result.engine}"
        title += told(result, apart)
        text += ["", title, "", f"Data: {source}. Suite {suite}, {_count(made)}.", ""]
        text += _table(HEAD, [_row(line) for line in made])
        text += ["", *_by_turn(made)]
    return "\n".join(text) + "\n"


def _preface(found: Sequence[Result]) -> list[str]:
    seconds = sum(r.environment["seconds"] for r in found)

    def named(key: str) -> str:
        return ", ".join(sorted({str(r.environment[key]) for r in found if key in r.environment}))

    versions = ", ".join(
        f"{name} {named(name)}"
        for name in ("kvplug", "vllm", "sglang", "torch", "lm_eval")
        if named(name)
    )
    models = ", ".join(sorted({r.config["model"] for r in found}))
    served = f", served in {named('dtype')}" if named("dtype") else ""
    return [
        *(f"    {command}" for command in sorted({r.config["command"] for r in found})),
        "",
        f"Model {models}{served}. {versions}, on {named('cpu')}, threads: {named('threads')}, "
        f"engine in {named('engine_processes')} process. {len(found)} settings, "
        f"{seconds / 60:.0f} minutes of answering (engine starts aside).",
        "",
        "Accuracy is the `fixed` score; `compat` is SCBench's own, defects included. Δ is the "
        "mean paired difference to dense on the same questions; the interval is a bootstrap over "
        "contexts. Loss is the mean -log p, in nats, of the true answer's tokens, forced one by "
        "one through decoding, *to random* that of `random` with the same budget (below zero: it "
        "beats random); *agrees* is the share of them that are the model's first choice. "
        "*KV held* is the engine's blocks per request while all decode, in bytes of its own "
        "pages; *read/step* is tokens per decode query, mean over the layers, as kvplug counts "
        "them; with a * it is arithmetic, since `engine(...)` is vLLM's own attention with that "
        "option and no kvplug; with a ≤ it is the budget, of which `top_p` reads what the device "
        "decides. An fp8 cache reads as many tokens as dense, in fewer bytes. **no signal**: "
        "dense itself is below 0.5, so nothing is ranked. **= dense**: read and held as much as "
        "dense, so no result. **not counted**: the run was stopped in the "
        "middle of what would have told. Times are of this machine and of all that ran on it.",
    ]


def differing(found: Sequence[Result]) -> list[str]:
    """What tells tables of the same suite, place and engine apart: a seed, a model, a dtype."""
    groups: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    for result in found:
        groups.setdefault((result.place, result.engine), []).append(result.flat)
    names = dict.fromkeys(name for rows in groups.values() for row in rows for name in row)
    return [
        name
        for name in names
        if any(len({row.get(name) for row in rows}) > 1 for rows in groups.values())
    ]


def told(result: Result, apart: Sequence[str]) -> str:
    """, seed 1 -- and always whose answers later turns quote, where these are the model's."""
    flat = result.flat
    own = ["answers"] if flat.get("answers") == "own" else []
    return "".join(
        f", {name} {flat[name]}" for name in dict.fromkeys([*own, *apart]) if name in flat
    )


def _question(question: str) -> str:
    return {
        "aware": "question in view of the compression",
        "agnostic": "context compressed alone",
    }[question]


def _count(made: Sequence[Line]) -> str:
    rows = made[0].result.of_task(made[0].task)
    contexts = len({row["conversation"] for row in rows})
    prompt = _number(made[0].means.get("prompt_tokens"), ",.0f", 1, " tokens")
    return f"{contexts} contexts, {len(rows)} questions, prompts of {prompt} on average"


def _row(line: Line) -> list[str]:
    means, turns = line.means, line.means["turns"]
    later = [turn["cached_tokens"] for turn in turns[1:] if "cached_tokens" in turn]
    cached = f"{turns[0].get('cached_tokens', 0):,.0f}"
    if later:
        cached += f" / {sum(later) / len(later):,.0f}"
    ranked = not line.is_dense and line.signal
    return [
        f"`{line.result.policy}`",
        f"{means['fixed']:.2f}",
        _interval(line.accuracy) if ranked else "",
        f"{means['compat']:.2f}",
        _interval(line.loss) if not line.is_dense else _number(means.get("loss"), ".2f"),
        "" if is_random(line.result.policy) else _interval(line.beyond_random),
        _number(means.get("agreement"), ".0%"),
        _number(means.get("held_bytes"), ",.1f", MiB, " MiB"),
        _number(line.held, ".0%"),
        _read(line.result.policy, means.get("read_per_step")),
        _number(line.read, ".0%"),
        cached,
        _number(means.get("first_token_seconds"), ".2f", 1, " s"),
        _number(means.get("token_seconds"), ".0f", 1e-3, " ms"),
        f"**{line.verdict}**" if line.verdict else "",
    ]


def _read(policy: str, tokens: float | None) -> str:
    """Marked where it is arithmetic, or a bound of what the device decides."""
    bound = "≤ " if "top_p=" in policy and tokens is not None else ""
    return bound + _number(tokens, ",.0f", 1, "*" * is_stock(policy))


def is_random(policy: str) -> bool:
    """The baseline alone, not what selects from it."""
    return policy.startswith("random(") and " + " not in policy


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _number(value: float | None, form: str, unit: float = 1, name: str = "") -> str:
    return "" if value is None else f"{value / unit:{form}}{name}"


def _by_turn(made: Sequence[Line]) -> list[str]:
    turns = len(made[0].means["turns"])
    if turns < 2:
        return []
    head = ("accuracy by turn", *(str(turn + 1) for turn in range(turns)))
    rows = [
        [f"`{line.result.policy}`", *(f"{turn['fixed']:.2f}" for turn in line.means["turns"])]
        for line in made
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    bars = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [bars[0], "|---" * len(head) + "|", *bars[1:]]
