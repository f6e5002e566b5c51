"""One server that allows much: what it refuses, by every way in, and what its counters may cost.

Its TMPDIR is a disk of 300 KiB of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.pace import Pace

httpx = pytest.importorskip("httpx")

from kvplug_evals.served import process  # noqa: E402
from kvplug_evals.served.engine import NAME  # noqa: E402
from kvplug_evals.served.start import serve  # noqa: E402
from kvplug_evals.served.vllm import VLLM  # noqa: E402
from tests.processes import disk_of, mount_disk  # noqa: E402
from tests.vllm.test_metrics import shown  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.timeout(900)]

OFFER = {"policy": "dense", "allow": ["snapkv", "quest", "keydiff"], "max_budget": 512}
LONG, SHORT = [(7 * i) % 40000 for i in range(600)], [7, 8, 9]


@dataclass(frozen=True, kw_only=True)
class Server(VLLM):
    disk: Path
    kv_cache_mib: int = 512
    dtype: str = "float32"

    def command(self, policy, port):
        command = super().command(policy, port)
        command[command.index("--additional-config") + 1] = json.dumps({"kvplug": OFFER})
        return command

    def settings(self):
        # Logprobs are compiled in TMPDIR, which would not do on this disk.
        return {**super().settings(), "TMPDIR": str(self.disk), "TORCH_COMPILE_DISABLE": "1"}


@dataclass(frozen=True, kw_only=True)
class Running:
    url: str
    disk: Path
    """As the server sees it."""
    log: Path

    def ask(self, path="completions", choice=None, **body) -> httpx.Response:
        xargs = {} if choice is None else {"vllm_xargs": {"kvplug": choice}}
        body = {"model": NAME, "max_tokens": 4, "temperature": 0, **xargs, **body}
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=300)

    def counted(self) -> dict[str, dict[str, float]]:
        page = httpx.get(f"{self.url}/metrics", timeout=30)
        assert page.status_code == 200
        assert "vllm:num_requests_running" in page.text
        return shown(page.text)


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    disk, log = folder / "disk", folder / "server.log"
    disk.mkdir()
    Pace.starts += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_die_with_parent", partial(mount_disk, str(disk), "300k"))
        with serve(Server(model=smollm2, disk=disk), "dense", log) as started:
            yield Running(url=started.url, disk=disk_of(disk), log=log)


CHAT = [{"role": "user", "content": "Hello"}]
WAYS_IN = {
    "completions": {"prompt": SHORT},
    "chat/completions": {"messages": CHAT},
    "chat/completions/batch": {"messages": [CHAT, CHAT]},
    "messages": {"messages": CHAT},
    "responses": {"input": "Hello", "max_output_tokens": 4},
}


@pytest.mark.parametrize("path", WAYS_IN)
@pytest.mark.parametrize(
    "choice, message",
    [("nonsense", "unknown policy 'nonsense'"), ("knorm(budget=64)", "does not allow knorm")],
)
def test_no_way_in_serves_what_is_not_on_offer(server, path, choice, message):
    answer = server.ask(path, choice, **WAYS_IN[path])
    assert answer.status_code == 400, answer.text
    assert message in answer.text
    assert server.ask(path, "quest(budget=64)", **WAYS_IN[path]).status_code == 200


@pytest.mark.parametrize(
    "prompt, choice, message",
    [
        (LONG, "nonsense", "unknown policy 'nonsense'"),
        (LONG, "knorm(budget=64)", "does not allow knorm"),
        (LONG, "snapkv(budget=512)", "serve it under 'dense'"),
        (LONG, "quest(budget=512)", "serve it under 'dense'"),
        (LONG, "dense", None),
        (LONG, None, None),
        (SHORT, "snapkv(budget=512)", None),
        (SHORT, "quest(budget=512)", None),
    ],
)
def test_beams_are_refused_where_a_policy_would_have_a_part(server, prompt, choice, message):
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 2}
    answer = server.ask(choice=choice, prompt=prompt, **beams)
    if message is None:
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == 2
    else:
        assert answer.status_code == 400, answer.text
        assert message in answer.text


def test_beams_of_a_chat_are_judged_too(server):
    beams = {"messages": CHAT, "use_beam_search": True, "n": 2}
    refused = server.ask("chat/completions", "nonsense", **beams)
    assert (refused.status_code, "unknown policy" in refused.text) == (400, True)
    assert server.ask("chat/completions", "dense", **beams).status_code == 200


def test_a_stream_is_refused_by_an_event(server):
    """vLLM has sent its status by then."""
    answer = server.ask(choice="nonsense", prompt=SHORT, stream=True)
    assert answer.status_code == 200
    (event, _) = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert (
        "unknown policy 'nonsense'" in json.loads(event.removeprefix("data: "))["error"]["message"]
    )


def fill(disk: Path) -> None:
    with (disk / "rest").open("wb", buffering=0) as rest, suppress(OSError):
        while True:
            rest.write(bytes(4096))


def test_a_full_disk_and_a_lost_folder_end_the_counting_and_nothing_else(server):
    """The last test: nothing is counted behind it."""
    assert server.ask(choice="quest(budget=96)", prompt=LONG).status_code == 200
    assert server.counted()["kvplug_decode_queries_total"]
    fill(server.disk)
    for budget in range(100, 130):  # each of them new to the counters
        answer = server.ask(choice=f"snapkv(budget={budget})", prompt=LONG)
        assert answer.status_code == 200, answer.text
    refusals = {"kvplug_refused_requests_total"}
    assert set(server.counted()) <= refusals, (
        "of the engine's process nothing, or it would be wrong"
    )
    (folder,) = server.disk.glob("kvplug-counters-*")
    shutil.rmtree(folder)
    assert server.ask(choice="nonsense", prompt=SHORT).status_code == 400
    assert not server.counted()
    assert server.ask(choice="quest(budget=64)", prompt=LONG).status_code == 200
    stopped = [line for line in server.log.read_text().splitlines() if "stopped counting" in line]
    assert ["No space left" in line for line in stopped] == [True, False]
    assert "was removed" in stopped[1]
