"""torch <- kvplug_kernels <- kvplug <- kvplug_vllm, kvplug_sglang <- kvplug_evals, and none back.

Read from the source, and for what an import really loads, in a fresh process.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "kvplug_kernels": ROOT / "kernels/kvplug_kernels",
    "kvplug": ROOT / "kvplug",
    "kvplug_vllm": ROOT / "kvplug_vllm",
    "kvplug_sglang": ROOT / "kvplug_sglang",
    "kvplug_evals": ROOT / "evals/kvplug_evals",
}
# Beside the standard library and the package itself. kvplug_evals uses what it measures with.
MAY_IMPORT = {
    "kvplug_kernels": {"torch"},
    "kvplug": {"torch", "numpy", "kvplug_kernels"},
    "kvplug_vllm": {"torch", "numpy", "kvplug_kernels", "kvplug", "vllm", "prometheus_client"},
    "kvplug_sglang": {"torch", "numpy", "kvplug_kernels", "kvplug", "sglang", "prometheus_client"},
}
# More, for some files: when the file is imported, or only inside its functions.
AT_IMPORT = {
    "kernels/**/kernel.py": {"triton"},
    "kernels/**/cpu.py": {"numba", "numpy"},
    "kernels/kvplug_kernels/cpu_memory.py": {"llvmlite", "numba", "numpy"},
    "kernels/**/bench.py": {"triton"},
    "kernels/kvplug_kernels/gpu_suite.py": {"triton"},
    "kvplug/cli.py": {"typer", "rich"},
}
IN_FUNCTIONS = {
    "kernels/**/*.py": {"triton"},
    "kvplug/cli.py": {"kvplug_vllm", "kvplug_sglang", "kvplug_evals"},
}
HEAVY = {"vllm", "sglang", "triton", "transformers", "lm_eval", "typer", "rich", "matplotlib"}


def modules(node: ast.AST) -> set[str]:
    """The absolute modules an import statement names; `from a import b` names a."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {node.module or ""}
    return set()


def imports(file: Path) -> tuple[set[str], set[str]]:
    """What a file imports when it is imported, and what only its functions import."""
    tree = ast.parse(file.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    late = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    at_import: set[str] = set()
    in_functions: set[str] = set()
    for node in ast.walk(tree):
        names = in_functions if node in late | typing_only else at_import
        names |= modules(node)
    return at_import, in_functions


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def extras(table: dict[str, set[str]], file: Path) -> set[str]:
    return set().union(*(names for glob, names in table.items() if file in set(ROOT.glob(glob))))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package):
    always = MAY_IMPORT[package] | set(sys.stdlib_module_names) | {package}
    for file in FOLDERS[package].rglob("*.py"):
        allowed = always | extras(AT_IMPORT, file)
        at_import, in_functions = map(top_level, imports(file))
        wrong = (at_import - allowed) | (in_functions - allowed - extras(IN_FUNCTIONS, file))
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_evals_use_adapters_only_by_their_front_door():
    for file in FOLDERS["kvplug_evals"].rglob("*.py"):
        names = set().union(*imports(file))
        behind = {n for n in names if n.startswith(("kvplug_vllm.", "kvplug_sglang."))}
        assert not behind, f"{file.relative_to(ROOT)} imports {', '.join(sorted(behind))}"


def test_reference_and_kernel_never_import_each_other():
    for op in FOLDERS["kvplug_kernels"].iterdir():
        for name, other in (("reference", "kernel"), ("kernel", "reference")):
            if (file := op / f"{name}.py").exists():
                assert not {n for n in set().union(*imports(file)) if n.endswith(f".{other}")}


@pytest.mark.parametrize("package", FOLDERS)
def test_importing_loads_no_engine(package):
    check = f"import sys, {package}; print(*sorted({HEAVY} & set(sys.modules)))"
    roots = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "evals")))
    run = subprocess.run(
        [sys.executable, "-c", check],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": roots},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize("root", ["kernels", "evals"])
def test_source_roots_are_no_packages(root):
    """`import kernels` must stay Hugging Face's, also when run from this folder."""
    assert not (ROOT / root / "__init__.py").exists()
