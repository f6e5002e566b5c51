"""A server of one policy, from its start until it answers to its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from kvplug_evals.served import process
from kvplug_evals.served.engine import Engine

START_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    log: Path
    start_seconds: float


@contextlib.contextmanager
def serve(
    engine: Engine, policy: str, log: Path, check: Callable[[], object] = lambda: None
) -> Iterator[Server]:
    """A server that answers. Raises EngineError that says why it does not.

    ``check()`` is called until it does, and may raise to stop it.
    """

    def answers() -> bool:
        check()
        return _answers(url)

    port = process.free_port()
    url = f"http://127.0.0.1:{port}"
    server = process.Server(engine.title, engine.command(policy, port), engine.environment(), log)
    try:
        server.wait(answers, START_SECONDS)
        yield Server(url=url, log=log, start_seconds=time.monotonic() - server.started)
    except httpx.HTTPError as error:
        raise server.request_failure(error) from error
    finally:
        server.stop()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=2).status_code == httpx.codes.OK
    return False
