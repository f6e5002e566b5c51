"""Text that ships with Python: prose from ``pydoc_data``, functions from the standard library."""

from __future__ import annotations

import ast
import pydoc_data.topics
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

_WORDS = (
    "anchor apple arrow basket beacon bottle branch bridge bronze butter button cabin camera "
    "candle canvas carpet castle circle cloud copper cotton cradle crystal curtain desert "
    "dragon drawer eagle engine fabric falcon feather fiddle forest fossil garden garlic "
    "ginger glacier granite guitar hammer harbor helmet honey hunter island jacket jungle "
    "kettle kitten ladder lantern lemon lizard magnet maple marble meadow mirror monkey "
    "mustard needle nickel nutmeg ocean olive orange orchid oyster paddle palace parrot "
    "pebble pencil pepper piano pillow planet pocket potato powder puzzle quartz rabbit "
    "ribbon river rocket saddle salmon shadow shovel silver spider spring statue stone sugar "
    "summer sunset temple thunder ticket tiger timber tomato tunnel turtle valley velvet "
    "violin volcano wagon walnut whistle window winter"
)
_CITIES = (
    "Athens Berlin Bogota Boston Cairo Dakar Delhi Dublin Geneva Hanoi Havana Helsinki "
    "Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Milan Nairobi Naples Oslo "
    "Paris Prague Quito Rome Seoul Sofia Sydney Tallinn Tokyo Tunis Vienna Warsaw Zagreb "
    "Zurich"
)
WORDS, CITIES = _WORDS.split(), _CITIES.split()
KINDS = {
    "animal": "tiger rabbit eagle falcon lizard monkey parrot salmon spider turtle kitten oyster",
    "food": "butter garlic ginger honey lemon mustard nutmeg olive potato sugar tomato walnut",
    "tool": "hammer ladder needle shovel pencil kettle paddle magnet saddle anchor lantern arrow",
    "place": "castle desert forest garden harbor island jungle meadow palace temple valley cabin",
}


@cache
def paragraphs() -> tuple[str, ...]:
    """Python's language reference, 465K characters, in its own order."""
    text = pydoc_data.topics.topics
    return tuple(
        paragraph
        for topic in sorted(text)
        for paragraph in text[topic].strip().split("\n\n")
        if paragraph.strip()
    )


@dataclass(frozen=True, kw_only=True)
class Function:
    name: str
    description: str
    source: str
    """Without the docstring."""


@cache
def functions(most_lines: int = 20) -> tuple[Function, ...]:
    """Functions of the standard library that say what they do, by module and name."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(folder.glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            said = ast.get_docstring(node)
            lines = (node.end_lineno or 0) - node.body[0].lineno
            if not said or len(node.body) < 2 or not 2 <= lines <= most_lines:
                continue
            description = " ".join(said.split("\n\n")[0].split())
            if len(description) < 30 or node.name in description:
                continue
            bare = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
            text = ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, node)))
            found.append(Function(name=node.name, description=description, source=text))
    return tuple({function.name: function for function in found}.values())


Count = Callable[[str], int]


def longest(
    build: Callable[[int], str],
    tokens: int,
    count: Count,
    *,
    least: int = 1,
    most: int = 1 << 22,
) -> int:
    """The greatest size up to ``most`` whose text has at most ``tokens`` tokens.

    Raises ValueError where the least has more, or the most fewer.
    """
    small = count(build(least))
    if small > tokens:
        raise ValueError(
            f"the shortest such context has {small} tokens, got tokens={tokens}; ask for more"
        )
    low, high = least, min(2 * least, most)
    while (size := count(build(high))) <= tokens:
        if high == most:
            raise ValueError(
                f"the longest such context has {size} tokens, got tokens={tokens}; ask for fewer"
            )
        low, high = high, min(2 * high, most)
    while high - low > max(1, low // 200):  # half a percent is close enough
        middle = (low + high) // 2
        if count(build(middle)) <= tokens:
            low = middle
        else:
            high = middle
    return low


def prose(characters: int, random: Random) -> list[str]:
    """Paragraphs of at least that many characters, from a random place on, around and around."""
    source = paragraphs()
    at = random.randrange(len(source))
    chosen: list[str] = []
    while characters > 0:
        chosen.append(source[at])
        characters -= len(source[at]) + 2
        at = (at + 1) % len(source)
    return chosen


def hide(facts: list[str], among: list[str], random: Random) -> str:
    """Facts between paragraphs, in order, one in each stretch of equal length."""
    text: list[str] = []
    for place, fact in enumerate(facts):
        start, stop = (len(among) * i // len(facts) for i in (place, place + 1))
        middle = random.randint(start, stop)
        text += [*among[start:middle], fact, *among[middle:stop]]
    return "\n\n".join(text)
