"""A real server that always ends: started, waited for, stopped with all its children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvplug_evals.engines.interface import EngineError

STOP_SECONDS = 10
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl."""
LIBC = ctypes.CDLL(None)

ADVICE = {
    r"Address already in use": "another program took the port meanwhile; run the command again",
    r"kvplug cannot serve": "kvplug refused, the reason is above; choose another --policy",
    r"No available memory|KV cache is needed|memory.*(larger|exceed|not enough)|out of memory|"
    r"[Nn]ot enough memory|Cannot allocate memory": "free some memory, or change what is asked "
    "of it: --kv-cache-mib in the demo, --contexts and --tokens in an evaluation",
    r"No module named '?(sgl_kernel|torchvision)": "SGLang on a CPU wants stand-ins for packages; "
    "in a checkout of kvplug, put tests/sglang/shims on PYTHONPATH (make demo-sglang does)",
    r"No accelerator": "set SGLANG_USE_CPU_ENGINE=1 (make demo-sglang does)",
    r"invalid choice: 'kvplug'|No module named|PackageNotFoundError": "the environment is "
    "incomplete; run make setup, for SGLang make setup-sglang",
    r"(config\.json|safetensors|tokenizer).*(not|no) |Can't load": "rebuild the models: "
    "rm -r .models, then make models (outside a checkout: python -m kvplug_evals.models)",
}
FAILURE = re.compile(r"\b\w*(?:Error|Exception|Killed)\b\s*:|^\S*\s*- |error: ")
PREFIX = re.compile(r"^\((?:\w+ )*pid=\d+\) (?:ERROR \d\d-\d\d \S+ \[\S+\] ?)?")


class Server:
    """A process group that ends no later than this process. Raises EngineError with its last
    words.
    """

    def __init__(
        self, title: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.title, self.log = title, log
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            out.write(f"$ {shlex.join(command)}\n")
            out.flush()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a group of its own: one signal reaches all of it
                preexec_fn=_die_with_parent,
            )

    def wait(self, answers: Callable[[], bool], seconds: float) -> None:
        """Until it answers."""
        while not answers():
            ended = self.process.poll()
            if ended is not None:
                raise self.failure(f"{self.title}'s server ended with {ended}")
            if time.monotonic() - self.started > seconds:
                raise self.failure(f"{self.title}'s server did not answer within {seconds:.0f} s")
            time.sleep(0.25)

    def stop(self) -> None:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.terminate()  # it ends its children in order
                self.process.wait(STOP_SECONDS)
        finally:  # whatever is left, also when a second Ctrl-C cuts the wait short
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def failure(self, what: str) -> EngineError:
        return EngineError(f"{what}.\n{diagnose(self.log)}")

    def request_failure(self, error: Exception) -> EngineError:
        what = f"{type(error).__name__} {error}".strip()
        return self.failure(f"a request to {self.title}'s server failed: {what}")


def _die_with_parent() -> None:
    """Between fork and exec: where nobody is left to stop it."""
    LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def diagnose(log: Path) -> str:
    """The log's last lines that say what failed, and what to do about it."""
    lines = [PREFIX.sub("", line).rstrip() for line in log.read_text(errors="replace").split("\n")]
    lines = [line for line in lines if line]
    failures = [line for line in lines if FAILURE.search(line) and " WARNING " not in f" {line}"]
    telling = list(dict.fromkeys(failures))[-6:]
    shown = telling or lines[-12:]
    text = "\n".join(shown)
    advice = [what for pattern, what in ADVICE.items() if re.search(pattern, text)][:1]
    return "\n".join(
        [
            f"The last that {log} says of it:",
            *(f"    {line[:300]}" for line in shown),
            f"What to do: {advice[0] if advice else f'read the whole log: less {log}'}",
        ]
    )
