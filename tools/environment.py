"""A virtual environment for one engine on a CPU: what both setup scripts do alike.

Needs only the standard library. Never installs a CUDA build of torch.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = (3, 11), (3, 13)

TORCH = "torch==2.13.0"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """What failed, why, and what to do about it."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


class Environment:
    """A virtual environment, addressed only through its own interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def create(self) -> None:
        if self.python.exists():
            say(f"using the virtual environment {self.folder}")
            return
        say(f"making the virtual environment {self.folder}")
        try:
            venv.create(self.folder, with_pip=True, symlinks=True)
        except subprocess.CalledProcessError as error:
            raise SetupError(
                f"could not make {self.folder}: this Python's venv or ensurepip module is"
                " missing; on Debian and Ubuntu: apt-get install python3-venv"
            ) from error

    def pip(self, *arguments: str, advice: str, also: Sequence[str] = (), of: str = "") -> None:
        """`pip install`, also the requirements `of` something; SetupError ends in `advice`."""
        command = [*self._pip, "install", "--progress-bar=off", "-qq", *arguments, *also]
        more = f", and {len(also)} requirements of {of}" if also else ""
        say(f"pip install {shlex.join(arguments)}{more}")
        if subprocess.run(command).returncode:
            raise SetupError(f"pip failed, its own message is above; {advice}")

    def resolve(self, requirement: str) -> dict[str, Any] | None:
        """What pip, as it is configured here, would install; None when it finds nothing."""
        command = [*self._pip, "install", "--dry-run", "--ignore-installed", "--no-deps"]
        run = subprocess.run(
            [*command, "--quiet", "--report=-", requirement], capture_output=True, text=True
        )
        return json.loads(run.stdout)["install"][0]["metadata"] if run.returncode == 0 else None

    def download(self, requirement: str, folder: Path) -> Path:
        """The wheel of one requirement, without what it requires and without keeping a copy."""
        say(f"pip download {requirement}")
        command = [*self._pip, "download", "--progress-bar=off", "-qq", "--no-cache-dir"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
        if subprocess.run(command).returncode:
            raise SetupError(
                f"pip failed, its own message is above; {requirement} must be on pip's index"
            )
        (wheel,) = folder.glob("*.whl")
        return wheel

    def ask(self, code: str, **environment: str) -> str:
        """Run code in the environment, return what it prints."""
        run = subprocess.run(
            [self.python, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        if run.returncode:
            raise SetupError(f"in {self.folder}, this failed: {code}\n{run.stderr.strip()}")
        return run.stdout.strip()

    def version(self, distribution: str) -> str | None:
        return json.loads(
            self.ask(
                "import importlib.metadata as m, json\n"
                f"try: print(json.dumps(m.version({distribution!r})))\n"
                "except m.PackageNotFoundError: print('null')"
            )
        )

    @property
    def _pip(self) -> list[str]:
        return [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input"]


def is_cpu_build(torch: dict[str, Any]) -> bool:
    """A CPU wheel either says so in its version or asks for no CUDA (or ROCm) library."""
    needs = " ".join(torch.get("requires_dist", []))
    return torch["version"].endswith("+cpu") or not re.search(r"nvidia|cuda|rocm", needs)


def install_torch(env: Environment) -> None:
    wanted = TORCH.partition("==")[2]
    if (env.version("torch") or "").partition("+")[0] == wanted:
        return  # the check after the installation refuses it if it is no CPU build
    found = env.resolve(TORCH)
    if found and is_cpu_build(found):
        source = []
    else:
        say(f"pip's own sources have no CPU build of {TORCH}: taking PyTorch's index")
        source = ["--index-url", PYTORCH_CPU_INDEX]
    env.pip(
        *source,
        TORCH,
        advice=f"a CPU build of {TORCH} must be on pip's index, in a folder named by"
        f" PIP_FIND_LINKS, or reachable at {PYTORCH_CPU_INDEX}",
    )


def verify(env: Environment, imports: str, values: str, **environment: str) -> list[str]:
    """Import what was installed, in a fresh process. -> torch's version, and the values

    values: what to ask of the imported, as Python expressions with commas between them.
    """
    say("checking: import what was installed")
    code = (
        f"{imports}\nimport json, torch\n"
        f"print(json.dumps([torch.version.cuda, torch.version.hip, torch.__version__, {values}]))"
    )
    cuda, hip, *found = json.loads(env.ask(code, **environment).splitlines()[-1])
    if cuda or hip:
        raise SetupError(
            f"torch {found[0]} is no CPU build; remove {env.folder} and run this again"
        )
    return found


def require_python(needs: str) -> None:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SetupError(
            f"Python {platform.python_version()} cannot run kvplug, which needs 3.11 to 3.13;"
            " name another one: make setup PYTHON=python3.12"
        )
    if sys.platform != "linux":
        raise SetupError(f"{needs} for Linux, this is {sys.platform}; use a container")


def run(main: Callable[[], None]) -> None:
    os.environ.pop("PYTHONPATH", None)
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup failed: {error}")
