"""A process that a nursery forks is the one that would have been started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.nursery import open_nursery
from tests.processes import runs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nurseries are for Linux")

SCRIPT = """
import json, multiprocessing, os, re, signal, sys

def seen():
    return {
        "arguments": sys.argv, "path": sys.path,
        "main": [__name__, __spec__ and __spec__.name], "folder": os.getcwd(),
        "original": [re.sub(r"=\\d+", "=", each) for each in sys.orig_argv if each != "-B"],
        "environment": {name: os.environ[name] for name in os.environ if name != "PARENT"},
        "files": sorted(int(each) for each in os.listdir("/proc/self/fd") if int(each) < 3),
        "parent": os.getppid() == int(os.environ["PARENT"]),
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "imported": "wave" in sys.modules, "nice": os.nice(0),
        "interrupted by": str(signal.getsignal(signal.SIGINT)),
    }

def child(line):
    line.send(seen())

if __name__ == "__main__":
    found = [seen()]
    os.environ["PARENT"] = str(os.getpid())
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(theirs,))
    process.start()
    found.append(ours.recv())
    process.join()
    print(json.dumps([*found, process.exitcode, input()]))
    sys.exit(3)
"""


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        ["asked.py"],
        ["-m", "asked"],
        ["-c", "import runpy; runpy.run_path('asked.py', run_name='__main__')"],
    ],
)
def test_a_fork_has_what_a_start_would_have(tmp_path, command, session):
    (tmp_path / "asked.py").write_text(SCRIPT)

    def ask() -> tuple[bool, dict]:
        done = subprocess.run(
            [sys.executable, *command, "an argument"], input="a line", text=True, cwd=tmp_path,
            capture_output=True, start_new_session=session, timeout=60,
            preexec_fn=partial(os.nice, 3),
            env={**os.environ, "PYTHONPATH": "a:b", "PARENT": str(os.getpid()), "SAID": "ä\n="},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (3, "")
        here, there, *rest = json.loads(done.stdout)
        return [each.pop("imported") for each in (here, there)], [here, there, *rest]

    imported, started = ask()
    assert imported == [False, False]
    with open_nursery(("wave",)):
        imported, forked = ask()
    assert imported == [True, True], "of a fork, and of its child"
    for one, other in zip(forked, started, strict=True):
        assert one == other


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_its_group_ends_a_fork_and_its_child(number):
    code = """
import multiprocessing, signal, time
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    print(process.pid, flush=True)
    process.join()
"""
    with open_nursery(("wave",)):
        process = subprocess.Popen(
            [sys.executable, "-c", code], start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    child = int(process.stdout.readline())
    os.killpg(process.pid, number)
    assert process.wait(60) == -number
    deadline = time.monotonic() + 60
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)
    process.stdout.close()


def test_what_imports_read_is_not_changed_under_them(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('other')")
    code = "import sys; print('wave' in sys.modules)"
    with open_nursery(("wave",)):
        said = [
            subprocess.run(
                [sys.executable, *flags, "-c", code], text=True, capture_output=True,
                env={**os.environ, **changed},
            ).stdout
            for flags, changed in [
                ([], {}), ([], {"NUMBA_X": "1"}), ([], {"PYTHONHASHSEED": "7"}), (["-I"], {}),
                ([], {"PYTHONPATH": str(tmp_path)}),
            ]
        ]  # fmt: skip
    assert said == ["True\n", *["False\n"] * 3, "other\nFalse\n"]
