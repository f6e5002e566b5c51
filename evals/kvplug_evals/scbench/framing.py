"""What SCBench's data leaves to the prompt: the instruction before a context, and how a turn asks.

Its rows hold bare contexts and questions, on the hub and in its JSONL files. The words around them
are ours, to the effect of its own; its order is kept, but for ``mf``, where each question stands
with its turn and not before the context. A row whose turns bring a ``cue`` of their own, as those
of our generators do, is put as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvplug_evals.scbench.schema import Conversation, Turn


@dataclass(frozen=True, kw_only=True)
class Frame:
    before: str = ""
    """What stands before the context."""
    question: str = "{}"
    cue: str = ""


BARE = Frame()
FRAMES = {
    "kv": Frame(before="Extract the value of a key from the JSON object below.", cue='"'),
    "repoqa": Frame(
        before="Below is the code of a project. Repeat the function that is described, word for "
        "word, in a code block.",
        cue="```\n",
    ),
    "qa_eng": Frame(
        before="Read this book. Answer the questions in as few words as possible.",
        question="Question: {}\n",
        cue="Answer:",
    ),
    "qa_chn": Frame(
        before="请先读下面这本书，再用尽量少的字回答问题。", question="问题：{}\n", cue="答案："
    ),
    "choice_eng": Frame(
        before="Read this book. Answer the questions with the letter of the right choice.",
        question="Question: {}\n",
        cue="Answer:",
    ),
}
ASKED_FOR = re.compile(r"The (.+?) is\b")


def framed(name: str, conversation: Conversation) -> Conversation:
    """A row of the task ``name`` as it is asked; each turn of a mixed one as its own task asks."""
    if any(turn.cue for turn in conversation.turns):
        return conversation
    before = FRAMES.get(name, BARE).before
    return replace(
        conversation,
        context=f"{before}\n\n{conversation.context}" if before else conversation.context,
        turns=tuple(_framed(name, turn) for turn in conversation.turns),
    )


def _framed(name: str, turn: Turn) -> Turn:
    if _task(name, turn) == "mf":
        named = ASKED_FOR.search(turn.input)
        asked = f"What is the {named[1]}?\n\n" if named else ""
        return replace(turn, input=asked + turn.input)
    frame = FRAMES.get(_task(name, turn), BARE)
    return replace(turn, input=frame.question.format(turn.input), cue=frame.cue)


def with_rivals(name: str, found: Sequence[Conversation]) -> list[Conversation]:
    """repoqa: an answer is compared with all functions that are asked for in its repository."""
    functions: dict[str, dict[str, None]] = defaultdict(dict)
    for conversation in found:
        for turn in conversation.turns:
            if _task(name, turn) == "repoqa":
                functions[conversation.repo or conversation.id][turn.gold] = None
    return [
        replace(
            one,
            turns=tuple(
                replace(turn, options=tuple(functions[one.repo or one.id]))
                if _task(name, turn) == "repoqa" and not turn.options
                else turn
                for turn in one.turns
            ),
        )
        for one in found
    ]


def _task(name: str, turn: Turn) -> str:
    """A turn of a mixed task names its own, as ``scbench_kv``."""
    return turn.task.removeprefix("scbench_") or name
