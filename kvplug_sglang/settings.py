"""The settings of the engine that this process serves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kvplug import BatchPlanner, Choices, Offer, Planner, Refused, Settings, read_offer, sharing
from kvplug.config import ENVIRONMENT
from kvplug.policy import Positions
from kvplug_sglang import windows
from kvplug_sglang.router import Router

if TYPE_CHECKING:
    from kvplug_sglang.metrics import Metrics

NAME = "kvplug"
FLAG = "--kvplug-policy"


def given(environ: Mapping[str, str] | None = None) -> object:
    """What the flag or KVPLUG_POLICY says: a policy line, or a JSON object of settings.

    The flag reaches the scheduler processes as KVPLUG_POLICY. Raises ValueError.
    """
    text = (os.environ if environ is None else environ).get(ENVIRONMENT, "").strip()
    if not text:
        return None
    if not text.startswith("{"):
        return {"policy": text}
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{FLAG} takes a policy line or a JSON object such as {{"policy": '
            f'"snapkv(budget=1024)", "min_context": 4096}}, got {text!r}: {error}'
        ) from None


def remember(flag: str) -> None:
    """Hand the flag to the processes that this one starts."""
    os.environ[ENVIRONMENT] = flag


@dataclass(frozen=True)
class Taken:
    """Pages of chunks that a request takes from elsewhere in the pool. [m] each"""

    sources: Tensor  # int64
    into: Tensor  # int64
    """Copies that the radix tree has under the request's own name."""
    shifts: Positions
    """Tokens that the keys of each move by."""


LayerClass = tuple[BatchPlanner, list[int]]
"""Layers that keep as much of a prompt, and who plans for them."""


class Engine:
    """What the hooks and the backend of one scheduler process share."""

    current: ClassVar[Engine | None] = None

    def __init__(self, offer: Offer, page_size: int, metrics: Metrics | None) -> None:
        self.offer = offer
        self.page_size = page_size
        self.metrics = metrics
        self.page_bytes = 0
        """Of a page on this rank, in all layers, where a policy may return some."""
        self.layer_bytes = 0.0, 0.0
        """Of a token in a layer on this rank, and of its share of its page's digest."""
        self.open_bytes = 0
        """Of the pages that requests are filling on this rank, where full ones are coded."""
        self.kv_heads = 0
        """Of a layer on this rank."""
        self.router = Router()
        self.window, self.longest = 0, 0
        """Tokens that the model's widest windowed layer sees, and that a request may have."""
        self.shares = False
        """Whether layers read another layer's cache."""
        self.scheduler: Any = None
        self.choices = Choices(offer.settings)
        self.planners = BatchPlanner(page_size)
        """Of the layers that keep most, which say how many private slots a prompt has."""
        self.planners.know(self.choices.settings)
        self.taken: list[Taken] = []
        """By requests that were looked up since the last step ran."""

    @classmethod
    def enter(cls, page_size: int, rank: int = 0) -> Engine:
        """Start anew: a process serves one engine at a time."""
        # Prometheus chooses how to store numbers when it is imported: never in SGLang's launcher.
        from kvplug_sglang.metrics import Metrics

        offer = read_offer(given(), environ={})
        metrics = Metrics(str(offer.settings.policy)) if rank == 0 else None
        cls.current = cls(offer, page_size, metrics)
        return cls.current

    @classmethod
    def of(cls, runner: Any) -> Engine:
        """The engine that a model runner belongs to; one of its own where no scheduler runs."""
        engine = cls.current
        if engine is None or engine.page_size != runner.page_size:
            engine = cls.enter(runner.page_size)
        return engine

    @classmethod
    def serving(cls) -> Engine:
        """The engine of this process, which hooks are only placed for."""
        assert cls.current is not None
        return cls.current

    def see(self, window: int, longest: int, layers: Sequence[int]) -> None:
        """Once a model is loaded: what its windowed layers see, in requests up to ``longest``, and
        the others, one that shares a cache by its owner's number. Raises ValueError where a policy
        has nothing to plan, or does not leave the windowed layers what they see."""
        if not layers and not self.dense:
            every = f"every layer of the model sees {window} tokens and no more"
            raise ValueError(
                f"kvplug: {every if window else 'no layer of the model attends'}, so that "
                f"{self.offer.settings.policy} has nothing to plan; use the policy 'dense'"
            )
        self.window, self.longest = window, longest
        self.shares = len(set(layers)) < len(layers)
        self._fits(self.offer.settings)

    def _fits(self, settings: Settings) -> Settings:
        """Raises Refused where other layers of the model would miss what a policy takes."""
        if self.window:
            windows.check(self.planners.planner(settings), self.window, self.longest)
        if self.shares:
            for reason in sharing.beside(settings):
                raise Refused("shared caches", reason)
        return settings

    def serve(self, layers: Sequence[int], rows: int, device: torch.device) -> list[LayerClass]:
        """Once a model is loaded: its layers, together with those that keep as much, most first.
        rows: of the pool.
        """
        policy, size = self.offer.settings.policy, self.page_size
        classes: list[LayerClass] = [(self.planners, list(layers))]
        if not policy.uniform:
            budgets = policy.layer_budgets(len(layers))
            classes = [
                (
                    BatchPlanner(size, budget, min(budgets)),
                    [layer for layer, own in zip(layers, budgets, strict=True) if own == budget],
                )
                for budget in sorted(set(budgets), reverse=True)
            ]
            self.planners = classes[0][0]
            self.planners.know(self.choices.settings)
        most = max(planner.schedule.most_private for planner in self.planners.planners)
        self.router.serve(rows, max(most, -(-self.offer.max_tokens // size), 1), device)
        return classes

    def choice(self, settings: Settings) -> int:
        """The number of some settings, by which ``planners`` knows them while a tenant has it."""
        number = self.choices.number(settings, self.router.choices)
        self.planners.know(self.choices.settings)
        return number

    def to_take(self) -> list[Taken]:
        """What was asked for since this was asked last, in order: one may take from where an
        earlier one did not look any more."""
        taken, self.taken = self.taken, []
        return taken

    @property
    def dense(self) -> bool:
        """Whether every request is served as SGLang would."""
        return self.offer.settings.policy.is_dense and not self.offer.mixed

    def planner(self, choice: int) -> Planner:
        return self.planners.planners[choice]

    def choose(self, sampling_params: Any, in_session: bool) -> Settings:
        """What a request asked for. Raises ValueError that says what it may."""
        if in_session and not self.dense:
            raise Refused(
                "session",
                "kvplug: a session hands its row of the pool, which a policy may have rewritten, "
                "to the next turn; send the whole prompt, which the prefix cache serves",
            )
        custom = sampling_params.custom_params
        asked = custom.get(NAME) if isinstance(custom, dict) else None
        return self._fits(self.offer.settings_for(asked))

    def policy(self, choice: int) -> str:
        """The line that a choice is counted by."""
        return str(self.planner(choice).settings.policy)

    def returned(self, choice: int, pages: int, private: int = 0) -> None:
        """A request that lives on gave back pages. private: those it holds in their place."""
        if self.metrics is not None:
            self.metrics.count_returned(self.policy(choice), pages, private, self.page_bytes)

    def refused(self, error: ValueError) -> None:
        if self.metrics is not None:
            self.metrics.count_refused(error)

    @contextmanager
    def packing(self, choice: int) -> Iterator[None]:
        """Time what compresses. On a GPU these are the host's seconds, not the kernels'."""
        began = perf_counter()
        yield
        if self.metrics is not None:
            self.metrics.count_packing(self.policy(choice), perf_counter() - began)

    def admit_again(self) -> None:
        """Memory came free while requests ran on, which SGLang only expects when one ends."""
        if self.scheduler is not None:
            self.scheduler.running_batch.batch_is_full = False
