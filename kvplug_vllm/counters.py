"""Counters that all processes of one server add to and its ``/metrics`` shows.

The engine counts in processes of its own, vLLM answers ``/metrics`` in another. Each process
writes a file in prometheus_client's multiprocess format into one folder; a collector in the
default registry adds the files up when it is asked. The folder's name travels with the choice of
kvplug: inside vLLM's configuration, which every process of a server gets from the one that started
it (``kvplug_vllm._reduce``). Where PROMETHEUS_MULTIPROC_DIR is set, by the user or by
``vllm serve --api-server-count 2``, that folder is used, and vLLM's own collector reads it.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import ClassVar

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from kvplug.counting import Counter, Counters

log = logging.getLogger("vllm.kvplug")

_mine: Counters | None = None
_opening = Lock()


def add(counter: Counter, amount: float, label: str) -> None:
    """Count in this process."""
    global _mine
    with _opening:
        if _mine is None or _mine.process != os.getpid():  # a fork shares no counts
            _mine = Counters(_folder, log)
    _mine.add(counter, amount, label)


def _folder() -> str:
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR") or Meeting.enter()


class Meeting:
    """Where the processes of one server meet; nothing is there until one of them enters."""

    PREFIX: ClassVar[str] = f"kvplug-counters-{os.getuid()}-"
    folder: ClassVar[Path | None] = None
    owner: ClassVar[int] = 0
    held: ClassVar[int | None] = None

    @classmethod
    def enter(cls) -> str:
        """The folder, there for as long as this process or one that it started lives. Raises
        OSError where there is room for none."""
        if cls.folder is None:
            name = f"{cls.PREFIX}{os.urandom(8).hex()}"
            cls.folder, cls.owner = Path(tempfile.gettempdir()) / name, os.getpid()
        if cls.held is None:
            sweep(cls.PREFIX, cls.folder)
            cls.held = hold(cls.folder)
            atexit.register(cls.leave)
        return str(cls.folder)

    @classmethod
    def invite(cls) -> str:
        """What to tell a process that is started: nothing, where it can count nowhere."""
        with suppress(OSError):
            return cls.enter()
        return ""

    @classmethod
    def join(cls, folder: str) -> None:
        """Count where the process counts that sent its configuration here."""
        if folder and folder != str(cls.folder):
            cls.folder, cls.owner, cls.held = Path(folder), 0, None

    @classmethod
    def leave(cls) -> None:
        if cls.folder is not None and cls.owner == os.getpid():
            shutil.rmtree(cls.folder, ignore_errors=True)


class Files(Collector):
    """Says nothing where nobody counted: vLLM's ``/metrics`` is then what it was."""

    _registered: ClassVar[bool] = False
    _unreadable: ClassVar[bool] = False

    @classmethod
    def register(cls, registry: CollectorRegistry = REGISTRY) -> None:
        if not cls._registered:
            cls._registered = True
            registry.register(cls())

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        if Meeting.folder is None:
            return
        try:
            files = [str(file) for file in Meeting.folder.glob("counter_*.db")]
            found = list(MultiProcessCollector.merge(files))
        except Exception as error:  # whatever became of the files, the rest of the page is shown
            if not Files._unreadable:
                Files._unreadable = True
                log.warning(
                    "kvplug: the counters in %s cannot be read (%s: %s) and are not on /metrics. "
                    "What is served does not change.",
                    Meeting.folder,
                    type(error).__name__,
                    error,
                )
            return
        yield from found


def hold(folder: Path) -> int:
    """Create the folder and keep it from ``sweep`` while this process lives. -> descriptor"""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_SH)
        if os.fstat(held).st_nlink:
            return held
        os.close(held)  # swept away between the two


def sweep(prefix: str, ours: Path) -> None:
    """Remove the folders of servers that were killed: no process holds them any more."""
    for folder in ours.parent.glob(f"{prefix}*"):
        if folder != ours:
            with suppress(OSError):
                opened = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(opened)
