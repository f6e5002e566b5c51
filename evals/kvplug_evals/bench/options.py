"""What ``kvplug bench attention`` was asked to measure, as data for a child process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from kvplug import parse


class Dtype(StrEnum):
    FP32 = "float32"
    BF16 = "bfloat16"


class Pages(StrEnum):
    SHUFFLED = "shuffled"
    IN_ORDER = "in-order"


class Policy(StrEnum):
    QUEST = "quest"
    TWILIGHT = "twilight"


class Clock(StrEnum):
    WALL = "wall"
    CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class Heads:
    name: str
    Hq: int
    H: int
    D: int


KNOWN_HEADS = {
    "smollm2": Heads(name="smollm2", Hq=9, H=3, D=64),
    "llama-8b": Heads(name="llama-8b", Hq=32, H=8, D=128),
}


def read_heads(name: str) -> Heads:
    """``llama-8b`` or ``32/8/128``. Raises ValueError."""
    if name in KNOWN_HEADS:
        return KNOWN_HEADS[name]
    numbers = name.split("/")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(
            f"heads must be {', '.join(KNOWN_HEADS)} or query/KV/dim such as 32/8/128, "
            f"got {name!r}"
        )
    Hq, H, D = map(int, numbers)
    if Hq % H:
        raise ValueError(f"{Hq} query heads do not divide among {H} KV heads")
    return Heads(name=name, Hq=Hq, H=H, D=D)


@dataclass(frozen=True, kw_only=True)
class Options:
    threads: int
    batch: list[int]
    context: list[int]
    heads: list[Heads]
    dtype: list[Dtype]
    budget: int
    policy: Policy = Policy.QUEST
    candidates: float | None = None
    """Share of the pages that twilight scores; None for all."""
    block_size: int
    repeats: int
    pages: Pages
    clock: Clock
    out: Path
    command: str

    def __post_init__(self) -> None:
        if self.block_size % 32:
            raise ValueError(
                f"block size must be a multiple of 32 (vLLM's CPU kernel), got {self.block_size}"
            )
        if self.clock is Clock.CPU and self.threads > 1:
            raise ValueError("the clock cpu is that of one thread: add --threads 1")
        if self.candidates is not None and self.policy is not Policy.TWILIGHT:
            raise ValueError(f"candidates are twilight's: drop --candidates with {self.policy}")
        parse(self.line)
        for context in self.context:
            if context <= self.budget:
                raise ValueError(
                    f"a context of {context:,} tokens is within the budget of {self.budget:,}: "
                    f"{self.policy} would be stock attention"
                )

    @property
    def line(self) -> str:
        """The policy as a server is given it."""
        of = "" if self.candidates is None else f", candidates={self.candidates}"
        return f"{self.policy}(budget={self.budget}{of})"

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Options:
        given = json.loads(text)
        given |= {
            "heads": [Heads(**heads) for heads in given["heads"]],
            "dtype": [Dtype(dtype) for dtype in given["dtype"]],
            "policy": Policy(given["policy"]),
            "pages": Pages(given["pages"]),
            "clock": Clock(given["clock"]),
            "out": Path(given["out"]),
        }
        return cls(**given)
