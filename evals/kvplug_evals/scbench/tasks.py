"""The tasks: what each measures, how it is put and scored, and where its data comes from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvplug_evals.scbench.framing import framed, with_rivals
from kvplug_evals.scbench.generators import GENERATORS, Order, make
from kvplug_evals.scbench.schema import Answer, Conversation, Turn, read_jsonl, read_rows

HUB = "microsoft/SCBench"
MAX_TURNS = 5
MODES = ("multi-turn", "multi-request")
SOURCES = ("generated", "hub")
"""Of data; any other name is a JSONL file's."""
EXACT, STAND_IN, LOADER, OURS = "exact recipe", "stand-in", "no generator", "our own task"


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    capability: str
    data: str
    metric: str
    """Of ``scorers.METRICS``; that of a turn's own ``task`` if it names one."""
    new_tokens: int
    generated: str = EXACT
    """What our generator's data is, in one word for every output."""
    close: str = ""
    """What ends a quoted answer in a conversation."""
    until: tuple[str, ...] = ("\n\n",)
    lead: str = "\n\n"
    """Between the context, turns and questions."""
    scbench: bool = True

    @property
    def hub_name(self) -> str:
        return f"scbench_{self.name}"


TASKS = {
    task.name: task
    for task in (
        Task(
            name="kv",
            capability="string retrieval",
            data="JSON of UUID pairs",
            metric="kv",
            new_tokens=150,
            close='"',
            until=('"', "\n"),
        ),
        Task(
            name="prefix_suffix",
            capability="string retrieval",
            data="random strings, found by their ends",
            metric="kv",
            new_tokens=150,
            until=("\n",),
        ),
        Task(
            name="vt",
            capability="string retrieval",
            data="variable tracking over several hops",
            metric="vt",
            new_tokens=30,
            until=("\n",),
        ),
        Task(
            name="repoqa",
            capability="semantic retrieval",
            data="standard library functions by their docstring",
            metric="repoqa",
            new_tokens=1024,
            generated=STAND_IN,
            close="\n```",
            until=("```",),
        ),
        Task(
            name="qa_eng",
            capability="semantic retrieval",
            data="facts in Python's language reference",
            metric="qa_eng",
            new_tokens=40,
            generated=STAND_IN,
            until=("\n",),
        ),
        Task(
            name="qa_chn",
            capability="semantic retrieval",
            data="Chinese books, from the hub or a file only",
            metric="qa_chn",
            new_tokens=40,
            generated=LOADER,
            until=("\n",),
        ),
        Task(
            name="choice_eng",
            capability="semantic retrieval",
            data="facts in Python's language reference, four choices",
            metric="choice_eng",
            new_tokens=40,
            generated=STAND_IN,
            until=("\n",),
        ),
        Task(
            name="many_shot",
            capability="global information",
            data="labelled sentences, our own labels",
            metric="many_shot",
            new_tokens=10,
            generated=STAND_IN,
            until=("\n",),
        ),
        Task(
            name="summary",
            capability="global information",
            data="Python's language reference, first paragraphs as summaries",
            metric="summary",
            new_tokens=200,
            generated=STAND_IN,
        ),
        Task(
            name="mf",
            capability="global information",
            data="arrays of numbers and their statistics",
            metric="mf",
            new_tokens=5,
            close=".",
            until=("\n",),
        ),
        Task(
            name="summary_with_needles",
            capability="multi-task",
            data="pass keys (exact) between stand-in summaries",
            metric="summary",
            new_tokens=800,
            generated=STAND_IN,
        ),
        Task(
            name="repoqa_and_kv",
            capability="multi-task",
            data="stand-in functions and UUID pairs (exact)",
            metric="repoqa",
            new_tokens=1024,
            generated=STAND_IN,
        ),
        Task(
            name="needle",
            capability="string retrieval",
            data="words hidden in Python's language reference",
            metric="kv",
            new_tokens=8,
            generated=OURS,
            close='".',
            until=('"', "\n"),
            scbench=False,
        ),
        Task(
            name="recall",
            capability="exact recall, hop by hop",
            data="key and value tokens for the recall model",
            metric="recall",
            new_tokens=4,
            generated=OURS,
            until=(),
            lead=" ",
            scbench=False,
        ),
    )
}
# A turn of a mixed task is put and scored as its own.
TURN_TASKS = {
    "repoqa": TASKS["repoqa"],
    "kv": replace(TASKS["kv"], new_tokens=80),
    "summary": replace(TASKS["summary"], new_tokens=800),
    "passkey": Task(
        name="passkey",
        capability="string retrieval",
        data="pass keys",
        metric="passkey",
        new_tokens=15,
        close=".",
        until=("\n",),
    ),
}


def task_named(name: str) -> Task:
    """Raises ValueError."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def task_of(task: Task, turn: Turn) -> Task:
    """How a turn is put and scored; one of the hub says ``scbench_kv``. Raises ValueError."""
    name = turn.task.removeprefix("scbench_")
    if name in ("", task.name):
        return task
    if name not in TURN_TASKS:
        raise ValueError(
            f"a turn's task must be {', '.join(TURN_TASKS)} or {task.name}, got {turn.task!r}"
        )
    return TURN_TASKS[name]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A turn as text. The conversation goes on with ``question``, ``cue``, answer, ``close``."""

    turn: int
    question: str
    cue: str
    gold: str
    close: str
    new_tokens: int
    until: tuple[str, ...]
    metric: str


def asks(task: Task, conversation: Conversation, turns: int) -> Iterator[Ask]:
    for place, turn in enumerate(conversation.turns[: min(turns, MAX_TURNS)]):
        how = task_of(task, turn)
        question, cue, bare = turn.input, turn.cue, not turn.cue
        if how.metric == "choice_eng" and turn.options:
            letters = zip("ABCD", turn.options, strict=False)
            question += "".join(f"{letter}. {option}\n" for letter, option in letters)
        apart = (cue or question).endswith(('"', "：", "\n", " "))
        gap = "" if apart else "\n" if bare else " "
        if task.lead == " ":
            cue, gap = f" {cue}", " "
        yield Ask(
            turn=place,
            question=task.lead + question,
            cue=cue,
            gold=gap + _letter(turn, how),
            close="" if bare else how.close,
            new_tokens=len(turn.gold.split()) if task.name == "recall" else how.new_tokens,
            until=() if bare else how.until,  # an answer may begin in a new line
            metric=how.metric,
        )


def _letter(turn: Turn, how: Task) -> str:
    """Data of the hub may give a choice by its text."""
    if how.metric == "choice_eng" and len(turn.options) > 4:
        raise ValueError(f"a choice is between at most 4 options, got {len(turn.options)}")
    if how.metric == "choice_eng" and turn.options and turn.gold not in tuple("ABCD"):
        if turn.gold not in turn.options:
            raise ValueError(f"the answer {turn.gold!r} is none of the options {turn.options}")
        return "ABCD"[turn.options.index(turn.gold)]
    return turn.gold


def check(task: Task, conversation: Conversation) -> None:
    """Raises ValueError, with its place, for a turn that cannot be put or scored."""
    for number, turn in enumerate(conversation.turns):
        try:
            how = task_of(task, turn)
            _letter(turn, how)
            if not turn.gold.strip():
                raise ValueError("answer is empty")
            if how.metric in ("mf", "passkey") and not _is_number(turn.answer):
                raise ValueError(f"answer of {how.name} must be a number, got {turn.gold!r}")
        except ValueError as error:
            raise ValueError(f"{conversation.place}: multi_turns[{number}]: {error}") from None


def _is_number(answer: Answer) -> bool:
    first = answer[0] if isinstance(answer, list) else answer
    return not isinstance(first, str) or re.fullmatch(r"\s*[-+]?\d+\s*", first) is not None


def load(
    name: str, *, data: str = "generated", contexts: int, order: Order, middle: int | None = None
) -> list[Conversation]:
    """The first ``contexts`` conversations of a source: generated, hub, or a JSONL path.

    ``middle``: truncate longer contexts in the middle to so many tokens. Raises ValueError.
    """
    task = task_named(name)
    if data == "generated":
        return [make(name, replace(order, index=i)) for i in range(contexts)]
    found = told_apart(_from_hub(task) if data == "hub" else read_jsonl(Path(data)))
    used = with_rivals(name, found)[:contexts]
    for conversation in used if data == "hub" else found:
        check(task, conversation)
    if middle is not None:
        used = [replace(c, context=truncated(c.context, middle, order.count)) for c in used]
    return [framed(name, conversation) for conversation in used]


def told_apart(found: Iterable[Conversation]) -> list[Conversation]:
    """Results are paired by conversation, so rows that share an id are numbered."""
    seen: Counter[str] = Counter()
    apart = []
    for conversation in found:
        seen[conversation.id] += 1
        again = seen[conversation.id] > 1
        name = f"{conversation.id}#{seen[conversation.id]}" if again else conversation.id
        apart.append(replace(conversation, id=name))
    return apart


def _from_hub(task: Task) -> list[Conversation]:
    if not task.scbench:
        raise ValueError(f"{task.name} is no task of SCBench: it has no data on the hub")
    import datasets

    rows: Any = datasets.load_dataset(HUB, task.hub_name, split="test")
    return read_rows(rows, f"{HUB} {task.hub_name}")


def truncated(context: str, tokens: int, count: Any) -> str:
    """The context without its middle, at most ``tokens`` tokens long."""
    if count(context) <= tokens:
        return context
    low, high = 0, len(context) // 2
    while high - low > 8:
        half = (low + high) // 2
        if count(context[:half] + context[-half:]) <= tokens:
            low = half
        else:
            high = half
    return context[:low] + context[len(context) - low :]


def source(name: str, data: str, vocabulary: str = "uuid") -> str:
    """What to say of the data in every output."""
    if data == "hub":
        return f"{HUB}, {task_named(name).hub_name}, instructions in our words"
    if data != "generated":
        return f"file {data}"
    told = task_named(name).generated
    words = name == "kv" and vocabulary == "words"
    return f"{told} but for words instead of UUIDs" if words else told


GENERATED = tuple(GENERATORS)
