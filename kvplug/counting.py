"""Counts of one process, in a file of prometheus_client's multiprocess format.

Counting decides about nothing that is served. Its file is written, never mapped: a mapped page
that a full disk has no room for ends the process. Where the file cannot be kept, the process says
so once in the log, its counters leave the page, and nobody else notices.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from kvplug.accounting import Labels

EMPTY = 8
"""Bytes of a file that counts nothing: its length, padded."""


@dataclass(frozen=True)
class Counter:
    """Shown as ``kvplug_<name>_total``, by one label at most."""

    name: str
    help: str
    label: str = ""

    def labels(self, value: str) -> dict[str, str]:
        return {self.label: value} if self.label else {}

    def __str__(self) -> str:
        return f"kvplug_{self.name}_total"


class Counters:
    """What this process counts. Raises nothing, whatever happens to the file."""

    def __init__(self, folder: Callable[[], str] | None, log: logging.Logger) -> None:
        """folder: where the file shall be, asked for once there is something to count; may raise
        OSError. None for no file."""
        self.process = os.getpid()
        self.stopped = False
        self._folder = folder
        self._log = log
        self._lock = Lock()
        self._labels: defaultdict[str, Labels] = defaultdict(Labels)
        self._known: dict[tuple[Counter, str], tuple[int, float]] = {}
        """Where each value stands in the file, and the value."""
        self._file = -1
        self._used = EMPTY

    def values(self) -> list[tuple[Counter, str, float]]:
        with self._lock:
            return [
                (counter, label, value) for (counter, label), (_, value) in self._known.items()
            ]

    def add(self, counter: Counter, amount: float, label: str = "") -> None:
        with self._lock:
            if self.stopped:
                return
            try:
                self._add(counter, amount, self._labels[counter.label](label))
            except OSError as error:
                self._stop(error)

    def _add(self, counter: Counter, amount: float, label: str) -> None:
        at, value = self._known.get((counter, label), (0, 0.0))
        value += amount
        if self._folder is not None:
            at = self._write(counter, label, value, at)
        self._known[counter, label] = at, value

    def _write(self, counter: Counter, label: str, value: float, at: int) -> int:
        """at: where the value stands in the file, 0 for nowhere yet. -> where it stands then"""
        assert self._folder is not None
        if self._file < 0:
            self._file = _create(f"{self._folder()}/counter_kvplug-{self.process}.db")
        if not os.fstat(self._file).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the file of its counters was removed")
        if at:
            _write(self._file, _value(value), at)
            return at
        entry = _entry(counter, label) + _value(value)
        _write(self._file, entry, self._used)
        self._used += len(entry)
        _write(self._file, _length(self._used), 0)
        return self._used - len(_value(0))

    def _stop(self, error: OSError) -> None:
        """Take the counters off the page: what is not counted on would be wrong there."""
        self.stopped = True
        if self._file >= 0:
            with suppress(OSError):
                _write(self._file, _length(EMPTY), 0)  # no other file may shrink: it is being read
            os.close(self._file)
        self._log.warning(
            "kvplug: process %d stopped counting (%s): its kvplug_* counters are gone from "
            "/metrics until the server is started again. What is served does not change.",
            self.process,
            error,
        )


def _create(path: str) -> int:
    """A file that counts nothing; a collector never sees it without its length. -> descriptor"""
    new = f"{path}.new"
    file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        _write(file, _length(EMPTY), 0)
        os.replace(new, path)
    except OSError:
        os.close(file)
        with suppress(OSError):
            os.unlink(new)
        raise
    return file


def _write(file: int, data: bytes, at: int) -> None:
    if os.pwrite(file, data, at) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# The layout is prometheus_client's (``mmap_dict.MmapedDict``).


def _length(used: int) -> bytes:
    return struct.pack("i4x", used)


def _value(value: float) -> bytes:
    """With no time: only gauges have one."""
    return struct.pack("dd", value, 0.0)


def _entry(counter: Counter, label: str) -> bytes:
    named = [f"kvplug_{counter.name}", str(counter), counter.labels(label), counter.help]
    key = json.dumps(named, sort_keys=True).encode()
    padded = key.ljust(len(key) + 8 - (len(key) + 4) % 8)
    return struct.pack(f"i{len(padded)}s", len(key), padded)
