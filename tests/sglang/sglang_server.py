"""A whole SGLang server, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conftest import free_port

from tests.pace import Pace

STARTS_IN = 400.0
"""Seconds."""


class Server:
    def __init__(self, port: int, process: subprocess.Popen[str], log: Path) -> None:
        self.url, self.process, self.log = f"http://127.0.0.1:{port}", process, log

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return str(reply.read().decode())

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=200) as reply:
            return json.load(reply)

    def ask(self, prompt: list[int], tokens: int, policy: Any = None) -> Any:
        """One request -> SGLang's reply."""
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        if policy is not None:
            sampling["custom_params"] = {"kvplug": policy}
        return self.post("/generate", {"input_ids": prompt, "sampling_params": sampling})

    def ask_all(self, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Requests at once -> their tokens."""
        with ThreadPoolExecutor(len(requests)) as pool:
            replies = list(pool.map(lambda request: self.ask(*request), requests))
        return [reply["output_ids"] for reply in replies]

    def forget(self) -> None:
        """Empty the prefix cache; SGLang refuses while the last batch is still counted."""
        for _ in range(50):
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(
                    urllib.request.Request(self.url + "/flush_cache", method="POST"), timeout=60
                ).close()
                return
            time.sleep(0.2)
        raise TimeoutError("the server never became idle")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        assert lines, f"/metrics has no {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def arguments(model: Path, port: int, *options: str) -> list[str]:
    return [
        "--model-path", str(model),
        "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port),
        "--max-total-tokens", "8192", "--mem-fraction-static", "0.5", "--chunked-prefill-size",
        "256", "--max-running-requests", "16", "--skip-tokenizer-init", "--skip-server-warmup",
        "--sleep-on-idle", "--nccl-port", str(free_port()), *options,
    ]  # fmt: skip


@contextlib.contextmanager
def serve(
    model: Path,
    folder: Path,
    *options: str,
    program: Sequence[str] = ("-m", "sglang.launch_server"),
    begin: Callable[[], None] | None = None,
    **environment: str,
) -> Iterator[Server]:
    """A server that is ready; stopped with all its processes in the end. begin: what its process
    does first."""
    port = free_port()
    log = folder / f"server-{port}.log"
    Pace.starts += 1
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *program, *arguments(model, port, *options)],
            stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            preexec_fn=begin,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )  # fmt: skip
    server = Server(port, process, log)
    try:
        deadline = time.monotonic() + STARTS_IN
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                server.get("/health")
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-6000:]}")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
