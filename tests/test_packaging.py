"""What is installed is what pyproject.toml says, and everything it names exists."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {
    Path(folder).name: ROOT / folder
    for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
}
ENTRY_POINTS = {
    **PROJECT["project"]["entry-points"],
    "console_scripts": PROJECT["project"]["scripts"],
}
TARGETS = sorted(target for group in ENTRY_POINTS.values() for target in group.values())


@pytest.mark.parametrize("target", TARGETS)
def test_entry_points_name_what_exists(target):
    """Read from the source: importing the adapters' modules would load an engine."""
    module, _, name = target.partition(":")
    package, _, rest = module.partition(".")
    path = PACKAGES[package].joinpath(*rest.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.exists(), f"{target}: there is no {file.relative_to(ROOT)}"
    defined = {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    assert name in defined


def test_installed_entry_points_are_current():
    try:
        installed = importlib.metadata.distribution("kvplug").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kvplug is not installed, only on the path")
    wanted = {(g, n, t) for g, entries in ENTRY_POINTS.items() for n, t in entries.items()}
    assert {(e.group, e.name, e.value) for e in installed} == wanted, "run `make setup` again"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package):
    assert (PACKAGES[package] / "__init__.py").exists()
    assert (PACKAGES[package] / "py.typed").exists()


def built(kind: str, folder: Path, source: Path = ROOT) -> Path:
    """The wheel or the sdist of a source tree."""
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (file,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in files}
    assert top == {*PACKAGES, f"kvplug-{PROJECT['project']['version']}.dist-info"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files)
    assert {"kvplug_evals/tasks/scbench/kv.yaml", "kvplug_evals/suites/recall.yaml"} <= set(files)
    assert {"kvplug/advice/published.json", "kvplug_evals/xray/page.html"} <= set(files)
    assert not [file for file in files if file.endswith(".pyc")]


def test_the_sdist_makes_the_same_wheel(wheel, tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as packed:
        names = packed.getnames()
        packed.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {"README.md", "LICENSE", "Makefile", "mkdocs.yml", "tests/test_packaging.py"} <= {
        name.partition("/")[2] for name in names
    }
    again = built("wheel", tmp_path / "again", folder)
    theirs, ours = (zipfile.ZipFile(each) for each in (again, wheel))
    assert sorted(theirs.namelist()) == sorted(ours.namelist())
    assert all(theirs.read(name) == ours.read(name) for name in ours.namelist())


OUTSIDE = """
import json, sys
from pathlib import Path
import kvplug, kvplug_evals, kvplug_kernels

here = Path(sys.argv[1])
for package in (kvplug, kvplug_evals, kvplug_kernels):
    assert Path(package.__file__).is_relative_to(here), package.__file__

from typer.testing import CliRunner
from kvplug.cli import app
from kvplug_evals.cli import app as evals

def told(app, *words):
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == 0, (words, found.output, found.exception)
    return found.output

assert "twilight" in told(app, "policies")
Path("config.json").write_text(sys.argv[2])
plan = json.loads(told(app, "plan", "config.json", "--gpu", "h100", "--json", "-"))
assert plan["best"] == "twilight(budget=0.0625)"
told(app, "new-method", "my_method")
assert Path("my_method/my_method.py").is_file()
for command in ("demo", "eval", "xray"):
    assert "--policy" in told(evals, command, "--help")

from kvplug_evals.models.recall import build_recall_model
from kvplug_evals.models.random_llama import build_random_llama
from kvplug_evals.sweep.settings import folder
from kvplug_evals.demo.conversation import TOPICS
from kvplug_evals.xray.looks import Xray
assert (folder("suites") / "recall.yaml").is_relative_to(here)
assert (folder("tasks") / "scbench/kv.yaml").is_file()
"""


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """A folder in which the wheel is installed."""
    for name in ("typer", "transformers", "lm_eval"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("installed")
    install(wheel, folder)
    return folder


def install(what: Path, folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "--disable-pip-version-check", "--target", folder, what],
        check=True,
    )  # fmt: skip


def outside(target: Path) -> dict[str, str]:
    """An environment in which it is found, and nothing of this folder."""
    return {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}


def test_the_wheel_runs_outside_the_checkout(target, tmp_path):
    """With what is installed here beside it, and nothing of this folder on the path."""
    model = {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", OUTSIDE, target, json.dumps(model)],
        capture_output=True, text=True, cwd=tmp_path, env=outside(target),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_the_cpu_setup_installs_versions_the_project_admits():
    specifiers = pytest.importorskip("packaging.specifiers")
    requirements = pytest.importorskip("packaging.requirements")
    pins = {
        node.targets[0].id: node.value.value.partition("==")[2]
        for name in ("environment", "setup_vllm_cpu", "setup_sglang_cpu")
        for node in ast.parse((ROOT / f"tools/{name}.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    extras = PROJECT["project"]["optional-dependencies"]
    asked = {
        r.name: r.specifier
        for line in PROJECT["project"]["dependencies"] + extras["vllm"] + extras["sglang"]
        for r in [requirements.Requirement(line)]
    }
    assert pins["VLLM"] in asked["vllm"]
    assert pins["SGLANG"] in asked["sglang"]
    assert pins["TORCH"] in asked["torch"]
    assert asked["vllm"] == specifiers.SpecifierSet(">=0.32,<0.34"), "every minor needs its tests"
