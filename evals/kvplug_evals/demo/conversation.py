"""One conversation for every policy: clients that share a long context and ask it for facts.

The context is Python's own language reference, which ships with Python as ``pydoc_data``. Facts
are planted in it as lines ``"city": "word"``. A client asks one a turn, as a completion; its
follow-ups quote the true answers, whatever the model said, so that prompts never depend on a
policy.

Afterwards come documents: prompts that share nothing, at once, more than the pool holds whole.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass

TOPICS = ("objects", "naming", "execmodel", "exceptions", "import")
FACTS = {
    "Lisbon": "bridge",
    "Oslo": "winter",
    "Cairo": "stone",
    "Lima": "market",
    "Boston": "camera",
    "Chicago": "orange",
    "London": "clock",
    "Nairobi": "horse",
    "Dublin": "paper",
    "Havana": "sugar",
    "Athens": "castle",
    "Seoul": "river",
}
CLIENTS, TURNS = 4, 3
DOCUMENTS = 8
OPENING = "\n\nThe entries above, once more:\n\n"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is asked of an engine."""

    characters: int = 20_000
    """Of the shared context; SmolLM2 makes a token of some four."""
    document_characters: int = 10_000
    document_tokens: int = 96
    """Decoded behind each document."""


# On a CPU SGLang's torch_native attention computes the queries of a whole context for every chunk
# of a prompt and drops all but the chunk's: a second turn costs its context's length, squared.
SIZES = {
    "vllm": Sizes(),
    "sglang": Sizes(characters=6_000, document_characters=4_000, document_tokens=32),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    client: int
    turn: int
    key: str
    answer: str
    depth: float
    """Share of the context that stands before the fact."""

    def __str__(self) -> str:
        return f'"{self.key}": "'


@dataclass(frozen=True, kw_only=True)
class Conversation:
    context: str
    questions: tuple[Question, ...]
    sizes: Sizes

    def turn(self, turn: int) -> list[Question]:
        """What the clients ask at once."""
        return [question for question in self.questions if question.turn == turn]

    def prompt(self, asked: Question) -> str:
        """The context, the client's earlier questions with their true answers, this question."""
        earlier = "".join(
            f'{question}{question.answer}"\n\n'
            for question in self.questions
            if question.client == asked.client and question.turn < asked.turn
        )
        return f"{self.context}{OPENING}{earlier}{asked}"


def conversation(sizes: Sizes) -> Conversation:
    """4 clients, 3 turns over one shared context; each turn asks at several depths."""
    paragraphs = list(_paragraphs(sizes.characters))
    text: list[str] = []
    depths: dict[str, float] = {}
    for place, key in enumerate(FACTS):
        start, stop = (len(paragraphs) * i // len(FACTS) for i in (place, place + 1))
        middle = (start + stop) // 2
        text += paragraphs[start:middle]
        depths[key] = sum(map(len, text))
        text += [f'"{key}": "{FACTS[key]}"', *paragraphs[middle:stop]]
    whole = sum(map(len, text))
    keys = list(FACTS)
    questions = []
    for turn in range(TURNS):
        for client in range(CLIENTS):
            key = keys[(client + turn) % TURNS * CLIENTS + client]
            depth = depths[key] / whole
            questions.append(
                Question(client=client, turn=turn, key=key, answer=FACTS[key], depth=depth)
            )
    return Conversation(context="\n\n".join(text), questions=tuple(questions), sizes=sizes)


def documents(sizes: Sizes) -> list[str]:
    """8 prompts of further parts of the reference."""
    topics = sorted(pydoc_data.topics.topics.items())
    text = "\n\n".join(topic.strip() for name, topic in topics if name not in TOPICS)
    length = sizes.document_characters
    return [text[start : start + length] for start in range(0, DOCUMENTS * length, length)]


def _paragraphs(left: int) -> Iterator[str]:
    for topic in TOPICS:
        for paragraph in pydoc_data.topics.topics[topic].strip().split("\n\n"):
            if left <= 0:
                return
            left -= len(paragraph)
            yield paragraph
