"""What is installed is what pyproject.toml says, and everything it names exists."""

import ast
import importlib.metadata
import subprocess
import sys
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


def test_wheel_holds_the_packages_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in files}
    assert top == {*PACKAGES, f"kvplug-{PROJECT['project']['version']}.dist-info"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files)
    assert {"kvplug_evals/tasks/scbench/kv.yaml", "kvplug_evals/suites/recall.yaml"} <= set(files)
    assert not [file for file in files if file.endswith(".pyc")]


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
