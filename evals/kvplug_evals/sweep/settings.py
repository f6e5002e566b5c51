"""A sweep as data: a YAML suite, what the command line changes of it, and its settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from kvplug import parse
from kvplug_evals.engines.stock import is_stock, parse_stock
from kvplug_evals.llmlingua import is_compressor, parse_compressor
from kvplug_evals.lm import ANSWERS, QUESTIONS
from kvplug_evals.models.folder import AUTO, DTYPES
from kvplug_evals.scbench.documents import documents
from kvplug_evals.scbench.tasks import MODES

MODELS = Path(".models")
SINKS = 32


def folder(name: str) -> Path:
    """``tasks`` or ``suites``: in the package once installed, beside it in a checkout."""
    inside = Path(__file__).parents[1] / name
    return inside if inside.exists() else Path(__file__).parents[2] / name


OPTIONS = tuple(
    name
    for name, parameter in signature(documents).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
    and name not in ("pretrained", "tokenizer", "compressor")
)
"""Of the data of a task of ours."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured, and on what."""

    name: str
    tasks: dict[str, dict[str, Any]]
    """lm-eval's name of a task -> options of its data."""
    model: str = "recall"
    """recall, smollm2, or a folder."""
    heads: dict[str, Any] = field(default_factory=dict)
    """Of the recall model: kv_heads, group, live."""
    tokens: tuple[int, ...] = (4096,)
    """Of a context."""
    contexts: int = 8
    turns: int = 5
    modes: tuple[str, ...] = MODES[:1]
    questions: tuple[str, ...] = QUESTIONS[:1]
    answers: str = ANSWERS[0]
    losses: bool = True
    policies: tuple[str, ...] = ()
    """May hold {budget}, {window} (a budget without streaming_llm's sinks), {half} and {share}, of
    the context; and ``engine(...)``, the engine's own options without kvplug."""
    budgets: tuple[float, ...] = ()
    """Shares of a context's tokens."""
    data: str = "generated"
    seed: int = 0
    limit: int | None = None
    """Documents of each task that is not ours."""
    room: int = 512
    """Tokens behind a context, for turns and answers."""
    block_size: int = 32
    dtype: str = AUTO
    """Of weights and cache: auto, float32, bfloat16 or float16."""
    about: str = ""

    def __post_init__(self) -> None:
        for task, options in self.tasks.items():
            unknown = sorted(set(options) - set(OPTIONS)) if ours(task) else []
            if unknown:
                raise ValueError(
                    f"suite {self.name}: {task} has no option {unknown[0]!r}; there are "
                    f"{', '.join(OPTIONS)}"
                )
        for name, values, allowed in (
            ("modes", self.modes, MODES),
            ("questions", self.questions, QUESTIONS),
            ("answers", (self.answers,), ANSWERS),
            ("dtype", (self.dtype,), DTYPES),
        ):
            wrong = [value for value in values if value not in allowed]
            if wrong:
                raise ValueError(
                    f"suite {self.name}: {name} must be of {', '.join(allowed)}, got {wrong[0]!r}"
                )
        wrong_shares = [share for share in self.budgets if not 0 < share <= 1]
        if wrong_shares:
            raise ValueError(
                f"suite {self.name}: a budget is a share of the context, above 0 and at most 1, "
                f"such as 0.25, got {wrong_shares[0]}; a number of tokens belongs into the policy"
            )

    @property
    def model_folder(self) -> Path:
        if self.model == "recall" and self.heads:
            live = "-".join(map(str, self.heads.get("live", (0,))))
            shape = f"{self.heads.get('kv_heads', 2)}x{self.heads.get('group', 1)}-live-{live}"
            return MODELS / f"recall-{shape}"
        return MODELS / self.model if self.model in ("recall", "smollm2") else Path(self.model)


def ours(task: str) -> bool:
    """A task of kvplug's, with a context and turns; not one of lm-eval's."""
    return task.startswith(("scbench_", "kvplug_"))


def read_suite(name: str) -> Suite:
    """A suite that kvplug brings, or a YAML file. Raises ValueError and OSError."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else folder("suites") / f"{name}.yaml"
    if not file.exists():
        there = ", ".join(sorted(f.stem for f in folder("suites").glob("*.yaml")))
        raise ValueError(f"there is no suite {name!r}; there are {there}, or give a YAML file")
    try:
        given = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {error}") from None
    known = {f.name for f in fields(Suite)}
    if not isinstance(given, dict) or not given.get("tasks"):
        raise ValueError(f"{file}: a suite is a mapping that names its tasks")
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{file}: there is no key {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
    if isinstance(given["tasks"], dict):
        given["tasks"] = {task: options or {} for task, options in given["tasks"].items()}
    return Suite(**{"name": file.stem, **_typed(given, str(file))})


def _typed(given: dict[str, Any], file: str) -> dict[str, Any]:
    """As Suite's annotations say. Raises ValueError."""
    types = get_type_hints(Suite)
    typed = {}
    for key, value in given.items():
        try:
            typed[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (key, *first["loc"])))
            raise ValueError(f"{file}: {where}: {first['msg']}, got {first['input']!r}") from None
    return typed


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One directory of results: everything that its numbers depend on."""

    engine: str
    model: str
    policy: str
    tokens: int
    mode: str
    question: str
    suite: Suite

    @property
    def config(self) -> dict[str, Any]:
        suite = asdict(self.suite)
        for varied in ("policies", "budgets", "modes", "questions", "tokens", "about", "model"):
            del suite[varied]
        if self.suite.dtype == AUTO:  # results from before the option keep their names
            del suite["dtype"]
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "suite": suite}

    @property
    def name(self) -> str:
        text = json.dumps(self.config, sort_keys=True)
        short = re.sub(r"[^\w=.]+", "-", self.policy).strip("-")[:60]
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.suite.name}-{self.tokens}-{self.mode}-{self.question}-{short}-{digest}"

    @property
    def compressor(self) -> bool:
        """The policy is a prompt compressor outside the engine: llmlingua(rate=0.5)."""
        return is_compressor(self.policy)

    @property
    def engine_policy(self) -> str:
        return "dense" if self.compressor else self.policy


def expand(suite: Suite, engine: str, policies: Sequence[str], baselines: bool) -> list[Setting]:
    """All settings, those of one engine side by side, dense first. Raises ValueError."""
    if engine != "vllm" and any(map(is_stock, policies or suite.policies)):
        raise ValueError(f"engine(...) names options of vLLM; leave it out with --engine {engine}")
    others = [task for task in suite.tasks if not ours(task)]
    if others and any(map(is_compressor, policies or suite.policies)):
        raise ValueError(
            f"llmlingua(...) compresses the contexts of kvplug's own tasks, and {others[0]} comes "
            "with prompts of its own; leave one of them out"
        )
    if others and (set(suite.modes) - {MODES[0]} or set(suite.questions) - {QUESTIONS[0]}):
        raise ValueError(
            f"{others[0]} comes with whole prompts of its own, without turns: leave out "
            f"{MODES[1]} and {QUESTIONS[1]}, or give the task a suite of its own"
        )
    settings = []
    for tokens in suite.tokens:
        lines = [
            line
            for template in policies or suite.policies
            for line in filled(template, tokens, suite.budgets, suite.block_size)
        ]
        if baselines:
            lines += same_bytes(lines)
        for policy in canonical(["dense", *lines]):
            settings += [
                Setting(
                    engine=engine,
                    model=str(suite.model_folder),
                    policy=policy,
                    tokens=tokens,
                    mode=mode,
                    question=question,
                    suite=suite,
                )
                for mode in suite.modes
                for question in suite.questions
            ]
    return settings


def filled(template: str, tokens: int, budgets: Iterable[float], page: int) -> list[str]:
    if "{" not in template:
        return [template]
    if not budgets:
        raise ValueError(
            f"{template!r} needs a budget; give --budget 0.25, or budgets: [0.25] in the suite"
        )
    lines = []
    for share in budgets:
        budget = max(2 * page, round(tokens * share / page) * page)
        try:
            lines.append(
                template.format(
                    budget=budget, window=budget - SINKS, half=budget // 2, share=share
                )
            )
        except (LookupError, ValueError):
            raise ValueError(
                f"{template!r} may hold {{budget}}, {{window}}, {{half}} and {{share}}, and no "
                "other braces"
            ) from None
    return lines


def same_bytes(lines: Iterable[str]) -> list[str]:
    """random and streaming_llm with the budget of each policy."""
    return [
        baseline
        for budget in map(budget_of, lines)
        if budget >= 2 * SINKS
        for baseline in (
            f"random(budget={budget})",
            f"streaming_llm(sinks={SINKS}, window={budget - SINKS})",
        )
    ]


def budget_of(line: str) -> int:
    """Tokens that a policy keeps, or reads where it keeps all; 0 without such a number, which a
    share of the context is not."""
    if is_compressor(line):
        return 0
    if is_stock(line):
        return parse_stock(line).sliding_window
    policy = parse(line)
    if policy.scored is not None:
        return 0 if policy.scored.appends else int(policy.scored.budget)
    if policy.eviction is not None:
        return policy.eviction.most_tokens()
    budget = 0 if policy.selector is None else policy.selector.budget
    return budget if isinstance(budget, int) else 0


def canonical(lines: Iterable[str]) -> list[str]:
    """As policies print themselves, none twice. Raises ValueError for a bad line."""
    printed = []
    for line in lines:
        if is_compressor(line):
            printed.append(str(parse_compressor(line)))
        elif is_stock(line):
            printed.append(str(parse_stock(line)))
        else:
            printed.append(str(parse(line)))
    return list(dict.fromkeys(printed))


def changed(suite: Suite, **options: Any) -> Suite:
    """The suite with what the command line says."""
    return replace(suite, **{name: value for name, value in options.items() if value is not None})
