"""Seeded contexts of a given length, in SCBench's schema.

Exact recipes, as the papers describe them: ``kv``, ``prefix_suffix``, ``vt`` (RULER's variable
tracking, between sentences of our own), ``mf`` and the needles. The books, papers and
repositories of the other tasks may not be shipped: there stand-ins from text that comes with
Python take their place, and every output says so.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from statistics import median

from kvplug_evals.scbench.schema import Conversation, Turn
from kvplug_evals.scbench.text import (
    CITIES,
    KINDS,
    WORDS,
    Count,
    functions,
    hide,
    longest,
    prose,
)

ENTRY = 1200
"""Characters of prose behind each fact, at least."""
NOISE = (
    "A path runs along the river. Two boats wait at the pier. Rain is expected in the evening. "
    "Somebody has left the gate open. It will be closed again."
)
VOCABULARIES = ("uuid", "words")
Built = tuple[str, list[Turn]]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One context: how long, how many turns, which seed."""

    tokens: int
    turns: int
    count: Count
    seed: int = 0
    index: int = 0
    vocabulary: str = "uuid"
    """kv: uuid (the recipe) or words, for models that cannot copy a UUID."""
    pairs: int = 0
    """kv and recall: how many, where filler takes the rest; 0 for kv: as many as fit."""
    hops: int = 4
    """recall: look-ups per answer. vt: assignments behind the first."""
    distractors: int = 0
    """recall: pairs that nobody asks for."""

    def random(self) -> Random:
        return Random(f"{self.seed}/{self.index}")

    def fit(self, build: Callable[[int], Built], *, least: int = 1, most: int = 1 << 22) -> Built:
        def text(size: int) -> str:
            return build(size)[0]

        return build(longest(text, self.tokens, self.count, least=least, most=most))


def make(name: str, order: Order) -> Conversation:
    """Raises ValueError for a task without a generator, or too few tokens."""
    try:
        build = GENERATORS[name]
    except KeyError:
        raise ValueError(
            f"{name} has no generator (its books have no stand-in); give data: a JSONL path or hub"
        ) from None
    context, turns = build(order)
    return Conversation(
        id=f"{name}-{order.tokens}-{order.seed}-{order.index}", context=context, turns=tuple(turns)
    )


def kv(order: Order) -> Built:
    """One JSON object of UUID pairs; each turn asks for the value of a key."""

    def build(pairs: int) -> Built:
        random = order.random()
        if order.vocabulary == "words":
            keys = _names(pairs, random)
            values = [str(random.randrange(1000, 10000)) for _ in keys]
        else:
            keys, values = ([_uuid(random) for _ in range(pairs)] for _ in range(2))
        data = ", ".join(f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True))
        asked = random.sample(range(pairs), order.turns)
        turns = [
            Turn(
                input=f'What is the value of the key "{keys[i]}"?\n',
                cue=f'"{keys[i]}": "',
                answer=values[i],
            )
            for i in asked
        ]
        head = "Extract the value of a key from the JSON object below.\n\nJSON data:\n"
        return f"{head}{{{data}}}", turns

    if order.pairs:
        return build(order.pairs)
    most = len(WORDS) ** 2 if order.vocabulary == "words" else 1 << 22
    return order.fit(build, least=order.turns, most=most)


def prefix_suffix(order: Order) -> Built:
    """Random strings; each turn gives the first and last letters of one."""
    size, shown = 40, 6

    def build(lines: int) -> Built:
        random = order.random()
        texts = ["".join(random.choices(string.ascii_lowercase, k=size)) for _ in range(lines)]
        turns = [
            Turn(
                input=f"Which string begins with {t[:shown]} and ends with {t[-shown:]}?\n",
                cue="The string is ",
                answer=t,
            )
            for t in random.sample(texts, order.turns)
        ]
        return "Strings:\n" + "\n".join(texts), turns

    return order.fit(build, least=order.turns)


def vt(order: Order) -> Built:
    """Chains of variables that take one another's value, hidden in noise."""

    def build(noise: int) -> Built:
        random = order.random()
        names = _labels(order.turns * (order.hops + 1), random)
        values = random.sample(range(10000, 100000), order.turns)
        lines, turns = [], []
        for chain, value in enumerate(values):
            variables = names[chain * (order.hops + 1) :][: order.hops + 1]
            lines.append([f"VAR {variables[0]} = {value}"])
            for before, after in pairwise(variables):
                lines[-1].append(f"VAR {after} = VAR {before}")
            turns.append(
                Turn(
                    input=f"Question: Which variables have the value {value} in the text above?\n",
                    cue=f"Answer: The {len(variables)} variables with the value {value} are",
                    answer=variables,
                )
            )
        # In random order, yet a variable always after the one whose value it takes.
        order_of = [i for i, chain in enumerate(lines) for _ in chain]
        random.shuffle(order_of)
        merged = [lines[i].pop(0) for i in order_of]
        slots = sorted(random.choices(range(noise + 1), k=len(merged)))
        text: list[str] = []
        for at, line in zip(slots, merged, strict=True):
            text += [NOISE] * (at - sum(t is NOISE for t in text))
            text.append(line)
        text += [NOISE] * (noise - sum(t is NOISE for t in text))
        head = "Keep track of the variables that are assigned in the following text.\n\n"
        return head + "\n".join(text), turns

    return order.fit(build)


def mf(order: Order) -> Built:
    """An array of numbers, of which each turn asks one statistic."""
    statistics: list[tuple[str, Callable[[list[int]], float]]] = [
        ("largest number", max),
        ("smallest number", min),
        ("median of the numbers", median),
        ("second largest number", lambda n: sorted(n)[-2]),
        ("second smallest number", lambda n: sorted(n)[1]),
        ("third largest number", lambda n: sorted(n)[-3]),
        ("third smallest number", lambda n: sorted(n)[2]),
    ]

    def build(half: int) -> Built:
        random = order.random()
        # An odd count, so that the median is one of them. At most four digits, or the five
        # tokens of an answer hold none where a digit is a token; long arrays repeat some.
        count, span = 2 * half + 1, min(max(100, 8 * half), 10_000)
        numbers = random.sample(range(span), count, counts=[1 + count // span] * span)
        asked = [statistics[i % len(statistics)] for i in range(order.turns)]
        turns = [
            Turn(
                input=f"What is the {name} in the list above?\n",
                cue=f"The {name} is",
                answer=int(of(numbers)),
            )
            for name, of in asked
        ]
        return f"List: {numbers}", turns

    return order.fit(build, least=2)


def qa_eng(order: Order) -> Built:
    """Stand-in: who left what where, told between paragraphs of Python's reference."""
    return _facts(order, choices=False)


def choice_eng(order: Order) -> Built:
    """Stand-in: the facts of qa_eng, with four answers to choose from."""
    return _facts(order, choices=True)


def _facts(order: Order, *, choices: bool) -> Built:
    def build(characters: int) -> Built:
        random = order.random()
        things = random.sample(WORDS, order.turns)
        places = random.sample(CITIES, order.turns)
        facts = [f"The {t} was left in {p}." for t, p in zip(things, places, strict=True)]
        turns = []
        for thing, place in zip(things, places, strict=True):
            input = f"Question: Where was the {thing} left?\n"
            if not choices:
                turns.append(
                    Turn(input=input, cue=f"Answer: The {thing} was left in", answer=place)
                )
                continue
            others = random.sample([city for city in CITIES if city != place], 3)
            options = random.sample([place, *others], 4)
            letter = "ABCD"[options.index(place)]
            turns.append(Turn(input=input, cue="Answer:", answer=letter, options=tuple(options)))
        random.shuffle(turns)
        return hide(facts, prose(characters, random), random), turns

    return order.fit(build, least=ENTRY)


def many_shot(order: Order) -> Built:
    """Sentences labelled with what they name; our own labels."""
    forms = ("I dreamt of the {}.", "They painted the {} again.", "We wrote about the {} all day.")

    def example(random: Random) -> tuple[str, str]:
        kind = random.choice(list(KINDS))
        return random.choice(forms).format(random.choice(KINDS[kind].split())), kind

    def build(shots: int) -> Built:
        random = order.random()
        asked = [example(random) for _ in range(order.turns)]
        lines = [
            f"Text: {text}\nLabel: {kind}"
            for text, kind in (example(random) for _ in range(shots))
        ]
        turns = [Turn(input=f"Text: {text}\n", cue="Label:", answer=kind) for text, kind in asked]
        return "\n\n".join(lines), turns

    return order.fit(build, least=4)


def repoqa(order: Order) -> Built:
    """Stand-in: functions of the standard library, asked for by what their docstring says."""

    def build(count: int) -> Built:
        random = order.random()
        chosen = random.sample(functions(), count)
        asked = random.sample(chosen, order.turns)
        # What the answer is compared with: every function that could be meant.
        options = tuple(function.source for function in chosen)
        turns = [
            Turn(
                input=f"Repeat the function of this description: {function.description}\n",
                cue="```python\n",
                answer=function.source,
                options=options,
                task="repoqa",
            )
            for function in asked
        ]
        return "\n\n".join(function.source for function in chosen), turns

    return order.fit(build, least=order.turns, most=len(functions()))


def summary(order: Order) -> Built:
    """Stand-in, a weak one: the first paragraph of an entry stands for the entry's summary."""

    def build(characters: int) -> Built:
        random = order.random()
        entries = []
        for number in range(order.turns):
            body = prose(max(1, characters // order.turns), random)
            entries.append((number + 1, body))
        context = "\n\n".join(
            f"Entry {number}\n\n" + "\n\n".join(body) for number, body in entries
        )
        turns = [
            Turn(
                input=f"Summarize entry {number} in a paragraph.\n",
                cue=f"Entry {number} in short:",
                answer=body[0].strip(),
                task="summary",
            )
            for number, body in entries
        ]
        return context, turns

    return order.fit(build, least=ENTRY)


def summary_with_needles(order: Order) -> Built:
    """A stand-in's summaries, and pass keys hidden by the exact recipe, turn about."""
    needles = (order.turns + 1) // 2
    summaries = order.turns - needles

    def build(characters: int) -> Built:
        random = order.random()
        keys = random.sample(range(10000, 100000), needles)
        names = random.sample(WORDS, needles)
        facts = [
            f"The pass key of the {n} is {k}. Remember it."
            for n, k in zip(names, keys, strict=True)
        ]
        text = prose(characters, random)
        asked = [
            Turn(
                input=f"What is the pass key of the {name}?\n",
                cue=f"The pass key of the {name} is",
                answer=key,
                task="passkey",
            )
            for name, key in zip(names, keys, strict=True)
        ]
        for number in range(summaries):
            first = text[len(text) * number // max(1, summaries)].strip()
            asked.insert(
                2 * number + 1,
                Turn(
                    input=f"Summarize part {number + 1} of {summaries} in a paragraph.\n",
                    cue="In short:",
                    answer=first,
                    task="summary",
                ),
            )
        return hide(facts, text, random), asked

    return order.fit(build, least=ENTRY)


def repoqa_and_kv(order: Order) -> Built:
    """Functions (a stand-in) between words and their numbers, asked turn about."""
    kv_turns = order.turns // 2
    code_turns = order.turns - kv_turns

    def build(count: int) -> Built:
        random = order.random()
        inner = replace(order, turns=max(1, kv_turns), pairs=max(count, kv_turns, 1))
        data, pairs = kv(inner)
        chosen = random.sample(functions(), count)
        options = tuple(function.source for function in chosen)
        turns = [
            Turn(
                input=f"Repeat the function of this description: {function.description}\n",
                cue="```python\n",
                answer=function.source,
                options=options,
                task="repoqa",
            )
            for function in random.sample(chosen, code_turns)
        ]
        for number, turn in enumerate(pairs[:kv_turns]):
            turns.insert(2 * number + 1, replace(turn, task="kv"))
        half = len(chosen) // 2
        code = [function.source for function in chosen]
        return "\n\n".join([*code[:half], data, *code[half:]]), turns

    return order.fit(build, least=order.turns, most=len(functions()))


def needle(order: Order) -> Built:
    """Words at places in prose, each turn asks one: the needle task alone."""

    def build(characters: int) -> Built:
        random = order.random()
        cities = random.sample(CITIES, order.turns)
        words = random.sample(WORDS, order.turns)
        facts = [f'The word of {c} is "{w}".' for c, w in zip(cities, words, strict=True)]
        turns = [
            Turn(input=f"What is the word of {c}?\n", cue=f'The word of {c} is "', answer=w)
            for c, w in zip(cities, words, strict=True)
        ]
        random.shuffle(turns)
        return hide(facts, prose(characters, random), random), turns

    return order.fit(build, least=ENTRY)


def recall(order: Order) -> Built:
    """Exact recall for the recall model: a key, and the chain of keys that follow it."""
    from kvplug_evals.models.recall import recall_prompt

    pairs = order.pairs or min(256, order.tokens // 8)
    prompt = recall_prompt(
        order.tokens,
        pairs,
        order.turns,
        seed=1000 * order.seed + order.index,
        hops=order.hops,
        distractors=order.distractors,
        disjoint=True,
    )
    turns = [
        Turn(input=word, cue=word, answer=" ".join(f"k{a}" for a in answers))
        for question, answers in zip(prompt.questions, prompt.answers, strict=True)
        for word in [f"k{question}"]
    ]
    return prompt.text, turns


GENERATORS: dict[str, Callable[[Order], Built]] = {
    f.__name__: f
    for f in (
        kv,
        prefix_suffix,
        vt,
        repoqa,
        qa_eng,
        choice_eng,
        many_shot,
        summary,
        mf,
        summary_with_needles,
        repoqa_and_kv,
        needle,
        recall,
    )
}


def _uuid(random: Random) -> str:
    digits = f"{random.getrandbits(128):032x}"
    return "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def _names(count: int, random: Random) -> list[str]:
    """Distinct words, and pairs of words when there are not enough."""
    if count <= len(WORDS):
        return random.sample(WORDS, count)
    if count > len(WORDS) ** 2:
        raise ValueError(f"at most {len(WORDS) ** 2} pairs of words, got {count}; use uuid")
    return [
        f"{WORDS[i // len(WORDS)]} {WORDS[i % len(WORDS)]}"
        for i in random.sample(range(len(WORDS) ** 2), count)
    ]


def _labels(count: int, random: Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choices(string.ascii_uppercase, k=5))] = None
    return list(found)
