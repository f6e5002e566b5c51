"""Processes of tests that begin with an engine imported, which takes an interpreter 20 seconds.

A *nursery* is a process that has imported an engine, of kvplug no more than comes with that as a
plugin, and only forks. While ``open_nursery`` is in force, whatever starts this Python, be it
subprocess or multiprocessing's spawn, here or in a process that came from here, is given a fork
of it: a child of its own, with the arguments, environment, folder, files, session and group that
it would have had, and a nursery for its own children. All else is as in a process that was
started: its main module, what it imports of kvplug, when engines load it as their plugin.

What reads its environment as it is imported would keep the nursery's: where a variable of
``READ_BY_IMPORTS`` differs, the process is started as ever. So is what other programs start, and
all that a test marked ``started`` starts.
"""

from __future__ import annotations

import _posixsubprocess
import contextlib
import ctypes
import fcntl
import gc
import importlib
import logging
import os
import pickle
import random
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

READ_BY_IMPORTS = (
    "MKL_", "PYTHON", "TORCH", "TRITON_INTERPRET", "NUMBA_", "SGLANG_USE_CPU_ENGINE",
    "SGLANG_PLUGINS", "VLLM_PLUGINS", "VLLM_LOGGING_", "VLLM_CONFIGURE_",
)  # fmt: skip
NOT_READ = (
    "PYTHONPATH", "PYTHONUNBUFFERED", "VLLM_LOGGING_LEVEL", "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "TORCH_COMPILE_DISABLE",
)  # fmt: skip
"""Followed when the process begins, or read by what no test compiles."""

VLLM = (
    "vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server", "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama", "lm_eval.evaluator",
    "matplotlib.pyplot",
)  # fmt: skip
SGLANG = (
    "sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.models.llama",
    "sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager",
    "lm_eval.evaluator",
)  # fmt: skip
TORCH = ("torch", "prometheus_client")
"""What counters need, where no engine is started."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl: orphans among the descendants become children."""

start = _posixsubprocess.fork_exec


@dataclass(frozen=True, kw_only=True)
class Birth:
    """What a process is to have."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    files: tuple[int, ...]
    """Descriptors, as it knows them, of the files that are sent with this."""
    session: bool
    group: int
    interrupted: bool
    """By Ctrl-C, which whoever ignores it has those ignore that it starts."""
    first: bytes
    """A pickled function without arguments, called before all else, or nothing."""


class Nursery:
    """This process's end of the line to the one that forks for it."""

    def __init__(self, line: socket.socket, lasting: bool) -> None:
        """lasting: no signal to its group is meant to end it, so only a fault does."""
        self.line, self.owner, self.lock = line, os.getpid(), threading.Lock()
        self.lasting, self.environment = lasting, read_by_imports(os.environ)

    def install(self) -> None:
        _posixsubprocess.fork_exec = subprocess._fork_exec = self.fork_exec

    def fork_exec(self, arguments: Any, *given: Any) -> int:
        birth, files = self.birth(arguments, *given) or (None, [])
        if birth is None:
            return start(arguments, *given)
        try:
            with self.lock:
                send(self.line, pickle.dumps(birth), files)
                (pid,) = struct.unpack("i", exactly(self.line, 4))
        except (OSError, EOFError):
            if self.lasting:
                raise
            pid = 0
        return pid or start(arguments, *given)

    def birth(
        self, arguments: Any, _1: Any, _2: Any, passed: Sequence[int], folder: Any,
        environment: Any, p2cread: int, _3: int, _4: int, c2pwrite: int, _5: int, errwrite: int,
        _6: int, failed: int, _7: bool, session: bool, group: int, gid: Any, groups: Any, uid: Any,
        umask: int, first: Any, _8: Any,
    ) -> tuple[Birth, list[int]] | None:  # fmt: skip
        words = [os.fsdecode(word) for word in arguments]
        if words[1:2] == ["-B"]:  # multiprocessing repeats PYTHONDONTWRITEBYTECODE
            del words[1]
        variables = dict(os.environ)
        if environment is not None:
            pairs = (os.fsdecode(pair).split("=", 1) for pair in environment)
            variables = {name: value for name, value in pairs}
        if (
            os.getpid() != self.owner
            or words[0] != sys.executable
            or len(words) < 3
            or (words[1].startswith("-") and words[1] not in ("-c", "-m"))
            or "resource_tracker" in words[2]  # imports nothing
            or read_by_imports(variables) != self.environment
            or (gid, groups, uid) != (None, None, None)
            or umask != -1
        ):
            return None
        standard = [p2cread, c2pwrite, errwrite]
        passed = [file for file in passed if file != failed]  # open until a program has begun
        sent = [mine if mine >= 0 else place for place, mine in enumerate(standard)] + passed
        known = [0, 1, 2, *passed]
        there = [place for place, mine in enumerate(sent) if is_open(mine)]
        try:
            first = pickle.dumps(first) if first else b""
        except (pickle.PicklingError, AttributeError):
            return None
        birth = Birth(
            arguments=tuple(words[1:]),
            environment=variables,
            folder=os.fsdecode(folder) if folder is not None else os.getcwd(),
            files=tuple(known[place] for place in there),
            session=session,
            group=group if group >= 0 else os.getpgid(0),
            interrupted=signal.getsignal(signal.SIGINT) is not signal.SIG_IGN,
            first=first,
        )
        return birth, [sent[place] for place in there]


def read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    read = {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_BY_IMPORTS) and name not in NOT_READ
    }
    folders = environment.get("PYTHONPATH", "").split(":")
    first = [folder for folder in folders if folder and Path(folder, "sitecustomize.py").exists()]
    return read | {"sitecustomize": ":".join(first)}


def is_open(file: int) -> bool:
    try:
        return fcntl.fcntl(file, fcntl.F_GETFD) >= 0
    except OSError:
        return False


def send(line: socket.socket, message: bytes, files: list[int]) -> None:
    socket.send_fds(line, [struct.pack("i", len(message))], files)
    line.sendall(message)


def exactly(line: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = line.recv(size - len(found))
        if not more:
            raise EOFError("the nursery has ended")
        found += more
    return found


def serve(line: socket.socket) -> None:
    """Forks until nobody is left that asks: then it ends. Each fork unwinds to where a process
    begins."""
    while True:
        head, files, *_ = socket.recv_fds(line, 4, 64)
        if not head:
            os._exit(0)
        (size,) = struct.unpack("i", head + exactly(line, 4 - len(head)))
        birth = pickle.loads(exactly(line, size))
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == parent:  # a signal of the parent's death must not be of this one
                time.sleep(0.0005)
            line.detach()
            begin(birth, files, tell)
            raise Born(birth.arguments)
        os.waitpid(between, 0)
        os.close(tell)
        line.sendall(os.read(told, 4).ljust(4, b"\0"))  # once it has begun
        for file in (told, *files):
            os.close(file)


def begin(birth: Birth, files: list[int], tell: int) -> None:
    first = pickle.loads(birth.first) if birth.first else lambda: None  # by the asker's own paths
    if birth.session:
        os.setsid()
    elif os.getpgid(0) != birth.group:
        with contextlib.suppress(OSError):
            os.setpgid(0, birth.group)
    last = max([*birth.files, 2]) + 1
    arrange({**dict(zip(birth.files, files, strict=True)), last: tell})
    os.environ.clear()
    os.environ.update(birth.environment)
    os.chdir(birth.folder)
    added = birth.environment.get("PYTHONPATH", "").split(":")
    added = [os.path.abspath(each) for each in added if each]
    sys.path[:] = [*added, *(each for each in OWN_PATH if each not in added)]
    importlib.invalidate_caches()
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in birth.environment)
    interrupt = signal.default_int_handler if birth.interrupted else signal.SIG_IGN
    signal.signal(signal.SIGINT, interrupt)
    follow(birth.environment)
    first()  # before its nursery, whose forks it holds for as it would for children
    nursery_of_this_process().install()
    os.write(last, struct.pack("i", os.getpid()))
    os.close(last)


def follow(environment: Mapping[str, str]) -> None:
    """What imports have read, as it would be read now."""
    random.seed()
    tempfile.tempdir = None
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))
    if dynamo := sys.modules.get("torch._dynamo.config"):
        dynamo.disable = environment.get("TORCH_COMPILE_DISABLE") == "1"
    if values := sys.modules.get("prometheus_client.values"):
        values.ValueClass = values.get_value_class()  # by PROMETHEUS_MULTIPROC_DIR
    if "vllm.logger" in sys.modules:
        logger = logging.getLogger("vllm")
        for each in (logger, *logger.handlers):
            each.setLevel(environment.get("VLLM_LOGGING_LEVEL", "INFO"))


def arrange(files: Mapping[int, int]) -> None:
    """Have these, under the numbers of the keys, and no others."""
    above = max([*files, 2]) + 1
    moved = {known: fcntl.fcntl(file, fcntl.F_DUPFD, above) for known, file in files.items()}
    kept = sorted(moved.values())
    for after, until in zip([-1, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(after + 1, until)
    for known, file in moved.items():
        os.dup2(file, known, inheritable=True)
        os.close(file)


def new_line() -> tuple[socket.socket, socket.socket]:
    """This process's end and a nursery's, which from now on may hand it children."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    return socket.socketpair()


def nursery_of_this_process() -> Nursery:
    """Forked before this process has done anything that its children would not have."""
    mine, theirs = new_line()
    if os.fork() == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        mine.detach()
        nothing = os.open(os.devnull, os.O_RDWR)
        arrange({0: nothing, 1: nothing, 2: nothing, 3: theirs.detach()})
        serve(socket.socket(fileno=3))
    theirs.close()
    return Nursery(mine, lasting=False)


class Born(BaseException):
    """In a fork of a nursery, however deep it was forked: what it was started with."""


def become(arguments: tuple[str, ...]) -> object:
    """Do what ``python`` does with these."""
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    sys.orig_argv[:] = [sys.executable, *arguments]
    match arguments:
        case "-c", code, *rest:
            sys.argv[:] = ["-c", *rest]
            sys.path.insert(0, "")
            return exec(compile(code, "<string>", "exec"), main.__dict__)
        case "-m", module, *rest:
            sys.argv[:] = [module, *rest]
            sys.path.insert(0, os.getcwd())
            return runpy._run_module_as_main(module)
        case script, *rest:
            sys.argv[:] = [script, *rest]
            sys.path.insert(0, str(Path(script).resolve().parent))
            return runpy.run_path(script, run_name="__main__")
    raise AssertionError(arguments)


@contextlib.contextmanager
def open_nursery(modules: tuple[str, ...]) -> Iterator[None]:
    """That has imported these. One for all who ask for the same, made for the first process."""

    def fork_exec(*given: Any) -> int:
        return _nursery(modules).fork_exec(*given)

    _posixsubprocess.fork_exec = subprocess._fork_exec = fork_exec
    try:
        yield
    finally:
        _posixsubprocess.fork_exec = subprocess._fork_exec = start


@cache
def _nursery(modules: tuple[str, ...]) -> Nursery:
    mine, theirs = new_line()
    theirs.set_inheritable(True)
    code = (
        f"import sys; own = sys.path[1:]; sys.path[:] = {sys.path!r}\n"
        f"from tests.nursery import main; main({modules!r}, {theirs.fileno()}, own)"
    )
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # or threads keep each other waiting
    environment.pop("PYTHONPATH", None)
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", code],
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
    )
    theirs.close()
    return Nursery(mine, lasting=True)


OWN_PATH: list[str] = []
"""Where this Python looks whatever its PYTHONPATH."""


def main(modules: Sequence[str], line: int, own_path: Sequence[str]) -> None:
    OWN_PATH.extend(own_path)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # a million objects that stay
    for module in modules:
        importlib.import_module(module)
    gc.enable()
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()
    try:
        serve(socket.socket(fileno=line))
    except Born as born:
        (arguments,) = born.args
    try:
        become(arguments)
    finally:
        gc.unfreeze()  # or Triton's bindings report at the end what was never collected
