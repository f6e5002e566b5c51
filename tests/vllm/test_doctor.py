"""``kvplug doctor`` as a user and a script run it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")

KVPLUG = [sys.executable, "-c", "from kvplug.cli import main; main()"]


def doctor(*options: str) -> tuple[int, dict[str, dict[str, object]]]:
    """Its status and what it found, by name."""
    command = [*KVPLUG, "doctor", "--json", "-", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.stdout.startswith("["), done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(900)
def test_what_is_healthy_and_what_would_be_refused(random_llama):
    status, found = doctor("--model", str(random_llama()), "--policy", "qest")
    assert status == 1
    assert "vllm 0." in found["versions"]["detail"]
    refused = [name for name, check in found.items() if not check["passed"]]
    assert refused == ["policy", "model"], found
    assert "Did you mean 'quest'" in found["policy"]["detail"]
