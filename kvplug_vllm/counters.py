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
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import ClassVar

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from kvplug import Labels


@dataclass(frozen=True)
class Counter:
    """Shown as ``kvplug_<name>_total``, by one label."""

    name: str
    help: str
    label: str

    def __str__(self) -> str:
        return f"kvplug_{self.name}_total"

    def add(self, amount: float, label: str) -> None:
        """Count in this process. Raises OSError where its file cannot be written."""
        file = CounterFile.of_this_process()
        label = file.labels[self.label](label)
        key = mmap_key(f"kvplug_{self.name}", str(self), [self.label], [label], self.help)
        file.add(key, amount)


class CounterFile:
    """What this process counted."""

    _mine: ClassVar[CounterFile | None] = None
    _opening: ClassVar[Lock] = Lock()

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = Lock()
        self.labels: defaultdict[str, Labels] = defaultdict(Labels)
        folder = Path(os.environ.get("PROMETHEUS_MULTIPROC_DIR") or Meeting.enter())
        self.values = MmapedDict(str(folder / f"counter_kvplug-{self.process}.db"))

    @classmethod
    def of_this_process(cls) -> CounterFile:
        with cls._opening:
            if cls._mine is None or cls._mine.process != os.getpid():  # a fork shares no counts
                cls._mine = cls()
            return cls._mine

    def add(self, key: str, amount: float) -> None:
        with self.lock:
            value, _ = self.values.read_value(key)
            self.values.write_value(key, value + amount, 0.0)


class Meeting:
    """Where the processes of one server meet; nothing is there until one of them enters."""

    PREFIX: ClassVar[str] = f"kvplug-counters-{os.getuid()}-"
    folder: ClassVar[Path] = Path(tempfile.gettempdir()) / f"{PREFIX}{os.urandom(8).hex()}"
    owner: ClassVar[int] = os.getpid()
    held: ClassVar[int | None] = None

    @classmethod
    def enter(cls) -> str:
        """The folder, there for as long as this process or one that it started lives."""
        if cls.held is None:
            sweep(cls.PREFIX, cls.folder)
            cls.held = hold(cls.folder)
            atexit.register(cls.leave)
        return str(cls.folder)

    @classmethod
    def join(cls, folder: str) -> None:
        """Count where the process counts that sent its configuration here."""
        if folder != str(cls.folder):
            cls.folder, cls.owner, cls.held = Path(folder), 0, None

    @classmethod
    def leave(cls) -> None:
        if cls.owner == os.getpid():
            shutil.rmtree(cls.folder, ignore_errors=True)


class Files(Collector):
    """Says nothing where nobody counted: vLLM's ``/metrics`` is then what it was."""

    _registered: ClassVar[bool] = False

    @classmethod
    def register(cls, registry: CollectorRegistry = REGISTRY) -> None:
        if not cls._registered:
            cls._registered = True
            registry.register(cls())

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        files = [str(file) for file in Meeting.folder.glob("counter_*.db")]
        yield from MultiProcessCollector.merge(files)


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
            with suppress(FileNotFoundError, BlockingIOError):
                opened = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(opened)
