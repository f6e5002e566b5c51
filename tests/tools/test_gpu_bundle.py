"""tools/gpu_bundle.py on wheels small enough to make here."""

import importlib.metadata
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_bundle  # noqa: E402

NOISE = random.Random(0).randbytes(5000)  # so that it does not compress to one part
SERVED = {
    "vllm/_C_stable_libtorch.abi3.so": NOISE,
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": b"three",
    "vllm/__init__.py": b"answer = 42\n",
    "vllm/third_party/pynvml.py": b"",
    "vllm-0.32.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n",
}
OTHERS = {
    "vllm/_moe_C_stable_libtorch.abi3.so": b"",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": b"",
    "vllm/third_party/deep_gemm/a.py": b"",
    "vllm/vllm-rs": b"",
}


def wheel(file: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file


@pytest.fixture
def bundle(tmp_path) -> Path:
    """In parts of 2,000 bytes, with one package."""
    package = {
        "tiny.py": b"value = 7\n",
        "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "tiny-1.0.dist-info/RECORD": b"tiny.py,,\ntiny-1.0.dist-info/METADATA,,\n"
        b"tiny-1.0.dist-info/WHEEL,,\ntiny-1.0.dist-info/RECORD,,\n",
    }
    parts = gpu_bundle.pack(
        wheel(tmp_path / "vllm-0.32.0-py3-none-any.whl", SERVED | OTHERS),
        [wheel(tmp_path / "tiny-1.0-py3-none-any.whl", package)],
        tmp_path / "bundle",
        2000,
    )
    assert len(parts) > 2
    assert all(part.stat().st_size <= 2000 for part in parts)
    return tmp_path / "bundle"


def test_what_is_carried_in_parts_arrives_whole_and_nothing_else(bundle, tmp_path):
    site, engine = gpu_bundle.unpack(bundle, tmp_path / "there")
    arrived = {
        file.relative_to(engine).as_posix(): file.read_bytes()
        for file in engine.rglob("*")
        if file.is_file()
    }
    assert arrived == SERVED
    code = "import tiny, vllm; print(tiny.value, vllm.answer)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": f"{site}:{engine}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["7", "42"], done.stderr


def test_the_engine_finds_kvplugs_plugins_there(bundle, tmp_path):
    site, engine = gpu_bundle.unpack(bundle, tmp_path / "there")
    found = {
        name: list(importlib.metadata.distributions(name=name, path=[str(site), str(engine)]))
        for name in ("kvplug", "vllm")
    }
    (ours,), (theirs,) = found["kvplug"], found["vllm"]
    assert theirs.version == "0.32.0"
    assert ("vllm.general_plugins", "kvplug_vllm:register") in {
        (entry.group, entry.value) for entry in ours.entry_points
    }


def test_a_part_that_is_missing_or_was_altered_is_named(bundle, tmp_path):
    second = bundle / "part2"
    data = second.read_bytes()
    second.write_bytes(data[:-1] + b"x")
    with pytest.raises(gpu_bundle.BundleError, match="part2 is not what was made"):
        gpu_bundle.unpack(bundle, tmp_path / "there")
    second.unlink()
    with pytest.raises(gpu_bundle.BundleError, match="lacks part2 of"):
        gpu_bundle.unpack(bundle, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_wheel_without_cudas_operators_is_refused(tmp_path):
    cpu = wheel(tmp_path / "vllm-0.32.0-py3-none-any.whl", {"vllm/__init__.py": b""})
    with pytest.raises(gpu_bundle.BundleError, match="none of the two libraries"):
        gpu_bundle.pack(cpu, [], tmp_path / "bundle", 2000)


def test_every_package_is_pinned():
    lines = gpu_bundle.PACKAGES.read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in packages)
    assert packages == sorted(packages, key=lambda line: line.partition("==")[0])
