"""SCBench's schema: a context and what is asked of it, one turn after another.

    {"id"?: ..., "context": "...", "repo"?: ...,
     "multi_turns": [{"input": ..., "answer": ..., "options"?: ..., "task"?: ..., "cue"?: ...}]}

A context is a text, or the numbers of an array (``mf``). ``repo`` tells where ``repoqa``'s code is
from. What else a row holds is left alone.
``cue`` is ours: the beginning of the answer, which is fed while decoding. With it every token of
an answer is read from what a policy left, also where the question stands in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Answer = str | int | float | list[str]


@dataclass(frozen=True, kw_only=True)
class Turn:
    input: str
    answer: Answer
    options: tuple[str, ...] = ()
    task: str = ""
    """Which of two, in tasks that mix two."""
    cue: str = ""

    @property
    def gold(self) -> str:
        """The answer as a conversation quotes it."""
        if isinstance(self.answer, list):
            return ", ".join(map(str, self.answer))
        return str(self.answer)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    id: str
    context: str
    turns: tuple[Turn, ...]
    repo: str = ""
    place: str = field(default="", compare=False)
    """Where the row stands, for errors."""

    def as_json(self) -> str:
        turns = [
            {k: v for k, v in asdict(turn).items() if v not in ("", ())} for turn in self.turns
        ]
        repo = {"repo": self.repo} if self.repo else {}
        row = {"id": self.id, "context": self.context, **repo, "multi_turns": turns}
        return json.dumps(row, ensure_ascii=False)


def read_conversation(row: object, place: str) -> Conversation:
    """``place`` is where the row stands, for the error. Raises ValueError."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: expected a JSON object with id, context and multi_turns")
    context, turns = row.get("context"), row.get("multi_turns")
    if isinstance(context, list) and all(type(number) in (int, float) for number in context):
        context = str(context)
    if not isinstance(context, str) or not context:
        raise ValueError(
            f"{place}: context must be a text or a list of numbers, got {_shown(context)}"
        )
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place}: multi_turns must be a list of turns, got {_shown(turns)}")
    return Conversation(
        id=place if row.get("id") is None else str(row["id"]),
        context=context,
        turns=tuple(_turn(t, f"{place}: multi_turns[{i}]") for i, t in enumerate(turns)),
        repo=str(row.get("repo") or ""),
        place=place,
    )


def _turn(turn: object, place: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place}: expected an object with input and answer, got {_shown(turn)}")
    for key in ("input", "answer"):
        if key not in turn:
            raise ValueError(f"{place}: {key!r} is missing")
    if not isinstance(turn["input"], str):
        raise ValueError(f"{place}: input must be a text, got {_shown(turn['input'])}")
    answer, options = turn["answer"], turn.get("options") or []
    plain = isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
    if isinstance(answer, list) and answer and all(type(a) in (str, int) for a in answer):
        answer = [str(a) for a in answer]
    elif not plain:
        raise ValueError(
            f"{place}: answer must be a text, a number or a list of texts, got {_shown(answer)}"
        )
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise ValueError(f"{place}: options must be a list of texts, got {_shown(options)}")
    return Turn(
        input=turn["input"],
        answer=answer,
        options=tuple(options),
        task=str(turn.get("task") or ""),
        cue=str(turn.get("cue") or ""),
    )


def read_jsonl(file: Path) -> list[Conversation]:
    """Raises ValueError with the line number and the reason, and OSError."""
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}; data is generated, hub or a JSONL file")
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line, parse_constant=_refused)
        except ValueError as error:  # also of bytes that are no UTF-8
            raise ValueError(f"{place}: not JSON: {error}") from None
        found.append(read_conversation(row, place))
    if not found:
        raise ValueError(f"{file}: there is no conversation in it")
    return found


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def read_rows(rows: Iterable[object], source: str) -> list[Conversation]:
    """Rows of a data set of the hub."""
    return [read_conversation(row, f"{source}, row {i}") for i, row in enumerate(rows)]


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
