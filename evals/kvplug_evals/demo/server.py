"""A real server that always ends: started, waited for, stopped with all its children."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from kvplug_evals.demo.engine import Engine

START_SECONDS = 300
STOP_SECONDS = 5


class ServerError(Exception):
    """What the server's log says, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    log: Path
    start_seconds: float


@contextlib.contextmanager
def serve(engine: Engine, policy: str, log: Path) -> Iterator[Server]:
    """A server that answers. Raises ServerError that says why it does not."""
    log.parent.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    command = engine.command(policy, port)
    url = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    with log.open("w") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=engine.environment(),
            start_new_session=True,  # a group of its own: one signal reaches engine and workers
        )
    try:
        while not _answers(url):
            if process.poll() is not None:
                raise ServerError(
                    f"{engine.title}'s server ended with {process.returncode}.\n{diagnose(log)}"
                )
            if time.monotonic() - started > START_SECONDS:
                raise ServerError(
                    f"{engine.title}'s server did not answer within {START_SECONDS} s.\n"
                    f"{diagnose(log)}"
                )
            time.sleep(0.25)
        yield Server(url=url, log=log, start_seconds=time.monotonic() - started)
    except httpx.HTTPError as error:
        what = f"{type(error).__name__} {error}".strip()
        raise ServerError(f"a request to the server failed: {what}.\n{diagnose(log)}") from error
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.terminate()  # it ends its children in order
            process.wait(STOP_SECONDS)
    finally:  # whatever is left, also when a second Ctrl-C cuts the wait short
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


ADVICE = {
    r"Address already in use": "another program took the port meanwhile; run the demo again",
    r"kvplug cannot serve": "kvplug refused, the reason is above; choose another --policy",
    r"No available memory|KV cache is needed|memory.*(larger|exceed|not enough)|out of memory|"
    r"Cannot allocate memory": "give the cache more memory with --kv-cache-mib, or free some",
    r"No module named '?(sgl_kernel|torchvision)": "SGLang on a CPU wants stand-ins for packages; "
    "run make demo-sglang, or put tests/sglang/shims on PYTHONPATH",
    r"No accelerator": "set SGLANG_USE_CPU_ENGINE=1, or run make demo-sglang",
    r"No module named|PackageNotFoundError": "the environment is incomplete; run make setup, for "
    "SGLang make setup-sglang",
    r"(config\.json|safetensors|tokenizer).*(not|no) |Can't load": "rebuild the models: "
    "rm -r .models && make models",
}
FAILURE = re.compile(r"\b\w*(?:Error|Exception|Killed)\b\s*:|^\S*\s*- |error: ")
PREFIX = re.compile(r"^\((?:\w+ )*pid=\d+\) (?:ERROR \d\d-\d\d \S+ \[\S+\] ?)?")


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
