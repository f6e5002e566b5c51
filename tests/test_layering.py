"""torch <- kvplug_kernels <- kvplug <- kvplug_vllm, kvplug_sglang <- kvplug_evals, and none back;
nor in a circle between the files of one, an import inside a function counted like any other.

Read from the source, and for what an import really loads, in a fresh process.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
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
CORE = {"torch", "numpy", "kvplug_kernels"}
ADAPTER = {*CORE, "kvplug", "prometheus_client"}
MAY_IMPORT = {
    "kvplug_kernels": {"torch"},
    "kvplug": CORE,
    "kvplug_vllm": {*ADAPTER, "vllm"},
    "kvplug_sglang": {*ADAPTER, "sglang"},
}
# More, for some files: when the file is imported, or only inside its functions.
AT_IMPORT = {
    "kernels/**/kernel.py": {"triton"},
    "kernels/**/cpu.py": {"numba", "numpy"},
    "kernels/**/cpu_*.py": {"llvmlite", "numba", "numpy"},
    "kernels/**/bench.py": {"triton"},
    "kernels/kvplug_kernels/gpu_suite.py": {"triton"},
    "kvplug/cli.py": {"typer", "rich"},
    "kvplug/*/cli.py": {"typer", "rich"},
    "kvplug/shown.py": {"typer", "rich"},
    "kvplug_sglang/cuda_triton.py": {"triton"},  # as SGLang's own backend that it wraps
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


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports(file: Path) -> tuple[set[str], set[str]]:
    """What a file imports when it is imported, and what only its functions import."""
    tree = parsed(file)
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


@cache
def matching(glob: str) -> frozenset[Path]:
    return frozenset(ROOT.glob(glob))


def extras(table: dict[str, set[str]], file: Path) -> set[str]:
    return set().union(*(names for glob, names in table.items() if file in matching(glob)))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package):
    always = MAY_IMPORT[package] | set(sys.stdlib_module_names) | {package}
    for file in FOLDERS[package].rglob("*.py"):
        allowed = always | extras(AT_IMPORT, file)
        at_import, in_functions = map(top_level, imports(file))
        wrong = (at_import - allowed) | (in_functions - allowed - extras(IN_FUNCTIONS, file))
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def module_of(package: str, file: Path) -> str:
    parts = (package, *file.relative_to(FOLDERS[package]).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = {
    module_of(package, file): file
    for package, folder in FOLDERS.items()
    for file in folder.rglob("*.py")
}


def files_imported(module: str) -> Iterator[str]:
    """The files of ours that a file names, wherever in it: `from a import b` names a.b if that is
    a file. What only holds them, the packages above, is imported by all and counts for nothing.
    """
    package = module if FILES[module].stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(parsed(FILES[module])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                named = f"{base}.{alias.name}"
                yield from [file for file in (named, base) if file in FILES][:1]


def circles(packages: set[str]) -> list[str]:
    graph = {
        module: {other for other in files_imported(module) if other != module}
        for module in FILES
        if module.partition(".")[0] in packages
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", FOLDERS)
def test_no_circle_of_imports_between_the_files_of_a_package(package):
    assert " <- ".join(circles({package})) == ""


def test_no_circle_of_imports_between_all_files():
    assert " <- ".join(circles(set(FOLDERS))) == ""


def test_a_circle_is_found_through_an_import_inside_a_function(tmp_path, monkeypatch):
    for name, text in {
        "__init__": "",
        "a": "from p import b\n",
        "b": "def late():\n    from .c import x\n",
        "c": "import p.a\n\nx = 1\n",
    }.items():
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        monkeypatch.setitem(FILES, f"p.{name}".removesuffix(".__init__"), file)
    assert set(circles({"p"})) == {"p.a", "p.b", "p.c"}


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


def test_importing_loads_no_engine():
    """One after another in one process, since torch alone takes seconds."""
    check = "import sys\n" + "".join(
        f"import {package}\nprint({package!r}, *sorted({HEAVY} & set(sys.modules)))\n"
        for package in FOLDERS
    )
    roots = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "evals")))
    run = subprocess.run(
        [sys.executable, "-c", check],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": roots},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == list(FOLDERS)


@pytest.mark.parametrize("root", ["kernels", "evals"])
def test_source_roots_are_no_packages(root):
    """`import kernels` must stay Hugging Face's, also when run from this folder."""
    assert not (ROOT / root / "__init__.py").exists()
