"""A new user's way: from the README to a server, to a method of one's own, to its eval, with
nothing but the wheel and what it needs."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from kvplug_evals.models.recall import recall_prompt
from kvplug_evals.served.process import free_port
from tests.pace import Pace
from tests.test_packaging import built, install, outside

for name in ("hatchling", "lm_eval", "typer"):
    pytest.importorskip(name)

RECALL = """
from pathlib import Path
from kvplug_evals.models.recall import build_recall_model
build_recall_model(Path(".models/recall"))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A folder in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    install(built("wheel", tmp_path_factory.mktemp("wheel")), folder)
    return folder


@pytest.mark.engine
@pytest.mark.started  # a nursery has this folder's own kvplug imported
@pytest.mark.timeout(900)
def test_from_the_wheel_to_a_server_to_a_method_to_its_eval(target, tmp_path):
    Pace.starts += 3
    small = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "2048"]
    environ = {
        **outside(target), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environ
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    kvplug = ("-c", "from kvplug.cli import main; main()")
    serve = ("-c", "from vllm.entrypoints.cli.main import main; main()", "serve")
    python("-c", RECALL)
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *serve, ".models/recall", "--attention-backend", "kvplug", *small,
             "--distributed-executor-backend", "uni", "--port", str(port)],
            stdout=log, stderr=log, cwd=tmp_path, env=environ,
        )  # fmt: skip
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health", tmp_path / "log")
        context = recall_prompt(512, 32, 1, seed=0, hops=3)
        asked = {
            "model": ".models/recall", "prompt": [*context.tokens, *context.questions],
            "max_tokens": 3, "temperature": 0, "return_token_ids": True,
        }  # fmt: skip
        reply = post(f"http://127.0.0.1:{port}/v1/completions", asked)
        assert reply["choices"][0]["token_ids"] == context.answers[0]
        metrics = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        assert "kvplug_decode_queries_total" in metrics
    finally:
        server.terminate()
        server.wait(60)

    python(*kvplug, "new-method", "my_method")
    install(tmp_path / "my_method", target)
    assert '"my_method"' in python(*kvplug, "policies", "--json", "-")
    shown = python(
        *kvplug, "eval", "--suite", "smoke", "--policy", "my_method(budget=256)",
        "--tokens", "1024", "--contexts", "1", "--turns", "1", "--no-baselines", "--in-process",
        "--dtype", "float32", "--json", "-",
    )  # fmt: skip
    dense, mine = json.loads(shown)
    assert (dense["policy"], dense["means"]["fixed"]) == ("dense", 1)
    assert mine["policy"].startswith("my_method(budget=256")
    assert mine["read_of_dense"] < 0.5
    assert (tmp_path / "eval-out/smoke-recall/report.md").is_file()


def wait_for(server: subprocess.Popen, url: str, log: Path) -> None:
    while True:
        assert server.poll() is None, log.read_text()
        try:
            urlopen(url, timeout=2)
        except OSError:
            time.sleep(0.5)
        else:
            return


def post(url: str, body: object) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urlopen(request).read())
