"""The settings of the engine that this process serves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvplug import Digest, Planner, Settings, read_settings
from kvplug.config import ENVIRONMENT
from kvplug_sglang.router import Router

if TYPE_CHECKING:
    from kvplug_sglang.metrics import Metrics

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


@dataclass
class Engine:
    """What the hooks and the backend of one scheduler process share."""

    settings: Settings
    page_size: int
    router: Router
    metrics: Metrics | None = None
    scheduler: Any = None
    planners: dict[Settings, Planner] = field(default_factory=dict)

    current: ClassVar[Engine | None] = None

    @classmethod
    def enter(cls, page_size: int, rank: int = 0) -> Engine:
        """Start anew: a process serves one engine at a time."""
        # Prometheus chooses how to store numbers when it is imported: never in SGLang's launcher.
        from kvplug_sglang.metrics import Metrics

        metrics = Metrics() if rank == 0 else None
        cls.current = cls(read_settings(given(), environ={}), page_size, Router(), metrics)
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

    @property
    def digest(self) -> Digest | None:
        """What pages must say of their keys for the requests that may come."""
        selector = self.settings.policy.selector
        return None if selector is None else selector.digest

    def planner(self, settings: Settings) -> Planner:
        if settings not in self.planners:
            self.planners[settings] = Planner(settings, self.page_size)
        return self.planners[settings]

    def settings_for(self, sampling_params: Any, in_session: bool) -> Settings:
        """What a request is served with. Raises ValueError that says what it may not ask for."""
        return self.settings

    def admit_again(self) -> None:
        """Memory came free while requests ran on, which SGLang only expects when one ends."""
        if self.scheduler is not None:
            self.scheduler.running_batch.batch_is_full = False
