"""vLLM for a GPU machine that has PyTorch and no network, in parts of a size that travels.

    python3 tools/gpu_bundle.py [--out .cache/gpu-bundle] [--most 55] [--vllm vllm==0.32.0]

makes `part1`, `part2`, … of at most so many MiB each: the compiled operators that Hopper needs,
FlashAttention 3 among them, vLLM's Python, and as wheels what tools/gpu_bundle.txt lists. Carry
them beside the checkout on that machine, one at a time if need be; `make gpu` unpacks them there
and runs whole engines. Under PyTorch 2.11 for CUDA 13 on a CPU everything imports and, against a
stub of the driver, both libraries load; not run on a GPU. Needs only the standard library and
1 GB beside the checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, cast
from zipfile import ZipFile

PROJECT = Path(__file__).resolve().parents[1]
OUT = PROJECT / ".cache" / "gpu-bundle"
PACKAGES = PROJECT / "tools" / "gpu_bundle.txt"
VLLM = "vllm==0.32.0"
MiB = 1 << 20
LIBRARIES = re.compile(r"^vllm/(_C_stable_libtorch|vllm_flash_attn/_vllm_fa3_C)\.abi3\.so$")
"""Others are for quantised weights, mixtures of experts, other models and other GPUs."""
LEFT_OUT = re.compile(r"\.so$|^vllm/vllm-rs$|^vllm/third_party/[^/]+/")
PYTHON = "3.12"
PLATFORMS = ("manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 40)))
"""Up to the C library of Ubuntu 24.04; pip takes each for itself alone."""
# PyTorch 2.11 lacks a function that vLLM calls; there is nothing for it to empty.
SITECUSTOMIZE = """\
import torch

if not hasattr(torch.accelerator, "empty_host_cache"):
    torch.accelerator.empty_host_cache = lambda: None
"""


class BundleError(Exception):
    """What is wrong, and what to do about it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--most", type=int, default=55, help="MiB of a part")
    parser.add_argument("--vllm", default=VLLM, help="a requirement, or a wheel that lies here")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=PROJECT) as folder:
        try:
            wheel = Path(options.vllm)
            if wheel.suffix != ".whl":
                (wheel,) = download(Path(folder) / "vllm", options.vllm)
            packages = download(Path(folder) / "packages", "--requirement", str(PACKAGES))
            parts = pack(wheel, packages, options.out, options.most * MiB)
        except BundleError as error:
            sys.exit(f"gpu_bundle: {error}")
    for part in parts:
        print(f"{part}: {part.stat().st_size / MiB:.1f} MiB")
    print(f"{wheel.name} and {len(packages)} packages, {time.monotonic() - started:.0f} s")


def download(folder: Path, *wanted: str) -> list[Path]:
    """Wheels for the GPU machine, whatever this one is."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", PYTHON]
    for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    if subprocess.run([*command, *wanted]).returncode:
        raise BundleError(f"pip failed, its own message is above; wanted: {' '.join(wanted)}")
    return sorted(folder.glob("*.whl"))


def pack(wheel: Path, packages: list[Path], out: Path, most: int) -> list[Path]:
    """One compressed archive, cut into parts of at most `most` bytes."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("part*"):
        stale.unlink()
    with tempfile.TemporaryFile(dir=out) as whole:
        with tarfile.open(fileobj=whole, mode="w:xz", preset=6) as archive:
            with ZipFile(wheel) as content:
                for name in contents(content.namelist()):
                    add(archive, f"engine/{name}", content.read(name))
            for package in packages:
                add(archive, f"packages/{package.name}", package.read_bytes())
        whole.seek(0)
        parts = list(cut(whole, out, most))
    sums = {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}
    (out / "bundle.json").write_text(json.dumps({"wheel": wheel.name, "parts": sums}, indent=1))
    return parts


def contents(names: list[str]) -> list[str]:
    """Of vLLM's wheel: its Python, its name and the two libraries. Raises BundleError."""
    libraries = [name for name in names if LIBRARIES.search(name)]
    if len(libraries) != 2:
        raise BundleError(
            f"the wheel has {', '.join(libraries) or 'none'} of the two libraries that a GPU "
            "needs; take a CUDA wheel of vLLM"
        )
    return libraries + [name for name in names if not LEFT_OUT.search(name) and name[-1] != "/"]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def cut(whole: IO[bytes], out: Path, most: int) -> Iterator[Path]:
    number = 1
    while data := whole.read(most):
        part = out / f"part{number}"
        part.write_bytes(data)
        yield part
        number += 1


def unpack(bundle: Path, into: Path) -> list[Path]:
    """What to put on PYTHONPATH to run vLLM and kvplug, the first first. Raises BundleError."""
    sums: dict[str, str] = json.loads((bundle / "bundle.json").read_text())["parts"]
    missing = [name for name in sums if not (bundle / name).exists()]
    if missing:
        raise BundleError(
            f"{bundle} lacks {', '.join(missing)} of {len(sums)} parts; carry them too, or remove "
            "bundle.json to run the kernels alone"
        )
    for name, wanted in sums.items():
        if hashlib.sha256((bundle / name).read_bytes()).hexdigest() != wanted:
            raise BundleError(f"{bundle / name} is not what was made; carry it again")
    with (
        closing(Chain([bundle / name for name in sums])) as chain,
        tarfile.open(fileobj=cast(IO[bytes], chain), mode="r|xz") as archive,
    ):
        archive.extractall(into, filter="data")
    site = into / "site"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    command += ["--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    if subprocess.run([*command, *map(str, sorted((into / "packages").iterdir()))]).returncode:
        raise BundleError("pip could not install the packages, its own message is above")
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    name_kvplug(site)
    return [site, into / "engine"]


class Chain:
    """Files read as one."""

    def __init__(self, files: list[Path]) -> None:
        self.rest = files
        self.current: IO[bytes] = io.BytesIO()

    def read(self, size: int) -> bytes:
        while not (data := self.current.read(size)) and self.rest:
            self.close()
            self.current = self.rest.pop(0).open("rb")
        return data

    def close(self) -> None:
        self.current.close()


def name_kvplug(site: Path) -> None:
    """Let the engine find this checkout's plugins, which lie on the path uninstalled."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    folder = site / f"kvplug-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kvplug\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n\n".join(groups) + "\n")


if __name__ == "__main__":
    main()
