"""Policies together: at most one for each stage, legal by what their classes declare.

What gives layers windows answers for those layers alone, and the format of pages for all of them
alike: each stands beside a policy of its stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

from kvplug.compress import (
    LayerBudgets,
    LocalLayers,
    PositionalEviction,
    ScoredEviction,
)
from kvplug.formats import KeyCodes, PageFormat
from kvplug.generate import BlockSelector, SparsePrefill
from kvplug.heads import Shape, read_heads
from kvplug.load import Selector
from kvplug.policies.dense import Dense
from kvplug.policy import LIMIT, Policy, Sharing, Stage
from kvplug.reuse import ChunkReuse


@dataclass(frozen=True)
class Composition:
    """What one line names: ``streaming_llm(window=4096) + quest(budget=1024)``.

    Raises ValueError, with both names, for two policies of one stage, and for a number that no
    tensor holds.
    """

    policies: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        real = tuple(p for p in self.policies if not isinstance(p, Dense))
        if len(real) < len(self.policies) and len(self.policies) > 1:
            raise ValueError(
                f"dense is the absence of a policy and cannot be combined, got "
                f"{' + '.join(map(str, self.policies))!r}; leave dense out"
            )
        answered: dict[tuple[Stage, Part], Policy] = {}
        for policy in real:
            other = answered.setdefault(_place(policy), policy)
            if other is not policy:
                stage = policy.stage.value
                if isinstance(policy, PageFormat):
                    stage = "format of pages"
                raise ValueError(
                    f"{other.name} and {policy.name} both answer the stage {stage!r}; keep one of "
                    "them"
                )
        for policy in real:
            _check_numbers(policy)
            if policy.alone and len(real) > 1:
                raise ValueError(
                    f"{policy.name} {policy.alone}, got {' + '.join(map(str, real))!r}; write "
                    f"{policy} alone"
                )
        order = list(Stage)

        def place(policy: Policy) -> tuple[int, Part]:
            stage, part = _place(policy)
            return order.index(stage), part

        object.__setattr__(self, "policies", tuple(sorted(real, key=place)))
        self._check_readers()

    def _check_readers(self) -> None:
        """Whether what selects reads what pages of this format have."""
        own, reads = self.stage(Stage.LOAD), self.selector
        if str(own) != str(reads):
            assert self.format is not None
            raise ValueError(
                f"{own.name} chooses by the codes that hold the keys, which are those of "  # type: ignore[union-attr]
                f"{self.format}, got {own}; write {self.format} + {reads}"
            )

    def __str__(self) -> str:
        return " + ".join(map(str, self.policies)) or "dense"

    def __iter__(self) -> Iterator[Policy]:
        return iter(self.policies)

    def stage(self, stage: Stage) -> Policy | None:
        """The policy that answers a stage for layers that see all, or None."""
        return next((p for p in self.policies if _place(p) == (stage, Part.PLANNED)), None)

    @property
    def local(self) -> LocalLayers | None:
        """What lets some layers see a window alone."""
        return next((p for p in self.policies if isinstance(p, LocalLayers)), None)

    @property
    def format(self) -> PageFormat | None:
        """What the bytes of all pages are; None for the numbers that the engine keeps."""
        return next((p for p in self.policies if isinstance(p, PageFormat)), None)

    def in_format(self, format: PageFormat | None) -> Composition:
        """The same over pages of this format, where the line names none."""
        if format is None or self.format is not None:
            return self
        return Composition((*self.policies, format))

    @property
    def plans(self) -> bool:
        """Whether anything is to be decided in layers that see all; if not, they are the engine's
        own."""
        return any(not isinstance(p, LocalLayers) for p in self.policies)

    @property
    def is_dense(self) -> bool:
        return not self.policies

    @property
    def eviction(self) -> PositionalEviction | None:
        policy = self.stage(Stage.COMPRESS)
        return policy if isinstance(policy, PositionalEviction) else None

    @property
    def scored(self) -> ScoredEviction | None:
        policy = self.stage(Stage.COMPRESS)
        if isinstance(policy, LayerBudgets):
            return policy.base
        return policy if isinstance(policy, ScoredEviction) else None

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps as much."""
        return not isinstance(self.stage(Stage.COMPRESS), LayerBudgets)

    def layer_budgets(self, layers: int) -> tuple[int, ...]:
        """Tokens that each layer keeps of a prompt's whole pages, where ``scored`` names one."""
        assert self.scored is not None
        policy = self.stage(Stage.COMPRESS)
        if isinstance(policy, LayerBudgets):
            return policy.layer_budgets(layers)
        return (int(self.scored.budget),) * layers

    @property
    def selector(self) -> Selector | None:
        """As it reads pages of the line's format."""
        policy = self.stage(Stage.LOAD)
        if not isinstance(policy, Selector):
            return None
        return policy if self.format is None else policy.over(self.format.codes)

    @property
    def generate(self) -> SparsePrefill | None:
        """As it reads pages that carry codes of their keys, where the line's selector has them."""
        policy, selector = self.stage(Stage.GENERATE), self.stage(Stage.LOAD)
        if isinstance(policy, BlockSelector) and isinstance(selector, Selector):
            codes = selector.digest if self.format is None else None
            return policy.over(codes) if isinstance(codes, KeyCodes) else policy
        return policy if isinstance(policy, SparsePrefill) else None

    @property
    def reuse(self) -> ChunkReuse | None:
        policy = self.stage(Stage.REUSE)
        return policy if isinstance(policy, ChunkReuse) else None

    @property
    def files(self) -> tuple[str, ...]:
        """As ``Policy.files``, of all that it names."""
        return tuple(file for policy in self for part in policy.parts for file in part.files)

    def misfits(self, config: Any) -> Iterator[str]:
        """Why its files do not fit a model. config: the model's, of transformers, that of its
        text."""
        for file in self.files:
            try:
                read_heads(file).check(Shape.of(config), file)
            except ValueError as error:
                yield f"{self}: {error}"

    @property
    def publishes(self) -> Sharing:
        """Whom pages written under this composition may serve: as few as its policies say."""
        order = list(Sharing)
        return max((p.publishes for p in self.policies), key=order.index, default=Sharing.PLAIN)


class Part(IntEnum):
    """What a policy of a stage answers for, in the order of the line."""

    LAYERS = 0
    PLANNED = 1
    PAGES = 2


def _place(policy: Policy) -> tuple[Stage, Part]:
    """What only one of a composition may answer: a stage, in layers that see all or in others, or
    for the bytes of all pages."""
    if isinstance(policy, PageFormat):
        return policy.stage, Part.PAGES
    return policy.stage, Part.LAYERS if isinstance(policy, LocalLayers) else Part.PLANNED


def _check_numbers(policy: Policy) -> None:
    """A step that meets a number which no tensor holds would end the engine for everyone."""
    for field in fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, Policy):
            _check_numbers(value)
        elif isinstance(value, int) and abs(value) >= LIMIT:
            raise ValueError(f"{policy.name}: {field.name} must be below 2 ** 62, got {value!r}")
