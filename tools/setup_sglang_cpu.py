"""Make a virtual environment in which SGLang runs on a CPU and kvplug is installed editable.

    python3 tools/setup_sglang_cpu.py [--venv .venvs/sglang]

Needs only the standard library, may be run again at any time, and never installs a CUDA build.
`pip install sglang` alone does not do, for two reasons:

- It asks for the CUDA builds of torch, flashinfer and its own kernels, several GB that no CPU can
  run. What it imports on a CPU is listed here instead, with the versions it was tried with.
- On a CPU it also imports `sgl_kernel` and `torchvision`, which have no build that works beside
  a CPU torch. The tests bring stand-ins: tests/sglang/shims.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import argparse
import time
from pathlib import Path

from environment import (
    PROJECT,
    TORCH,
    Environment,
    install_torch,
    require_python,
    run,
    say,
    verify,
)

SGLANG = "sglang==0.5.23"
TRITON = "triton==3.9.0"  # SGLang imports it whatever the attention backend
REQUIREMENTS = [
    "transformers==5.19.0",
    "tokenizers==0.23.2",
    "apache-tvm-ffi==0.1.11",
    "openai==2.8.0",
    "xgrammar==0.2.7",
    "uvicorn>=0.51",
    "IPython",
    "aiohttp",
    "dill",
    "einops",
    "fastapi",
    "gguf",
    "huggingface_hub",
    "interegular",
    "jsonschema",
    "loguru",
    "msgspec",
    "numpy",
    "orjson",
    "packaging",
    "partial_json_parser",
    "pillow",
    "prometheus-client",
    "psutil",
    "pybase64",
    "pydantic",
    "python-multipart",
    "pyzmq",
    "requests",
    "safetensors",
    "sentencepiece",
    "setproctitle",
    "soundfile",
    "tqdm",
    "uvloop",
    "xxhash",
    "zstandard",
]
# Requires a torch of its own choice.
QUANTISATION = "compressed-tensors==0.18.0"
TESTS = ["pytest>=8.3", "pytest-xdist>=3.6", "pytest-timeout>=2.3"]
SHIMS = PROJECT / "tests" / "sglang" / "shims"

IMPORTS = "import sglang, transformers, kvplug, lm_eval, sglang.srt.managers.scheduler"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venvs" / "sglang")
    env = Environment(parser.parse_args().venv.absolute())
    started = time.monotonic()

    require_python("SGLang has wheels")
    env.create()
    install_torch(env)
    # torch is named again in every call, or a requirement of another package could replace it.
    env.pip(
        TORCH,
        TRITON,
        *("--editable", f"{PROJECT}[cli,plot,evals]"),
        also=[*REQUIREMENTS, *TESTS],
        of=SGLANG,
        advice="SGLang's requirements and kvplug's own must be on pip's index",
    )
    # Without their requirements, which are GPU builds.
    env.pip("--no-deps", SGLANG, QUANTISATION, advice=f"{SGLANG} must be on pip's index")
    stand_ins = {"PYTHONPATH": str(SHIMS), "SGLANG_USE_CPU_ENGINE": "1"}
    torch, sglang = verify(env, IMPORTS, "sglang.__version__", **stand_ins)
    say(f"torch {torch}, sglang {sglang}, ready in {env.folder}")
    say(f"took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main)
