"""What a new version of vLLM moved of what kvplug leans on, read from the source alone.

    pip download --no-deps --dest /tmp vllm==0.32.0 vllm==0.33.0
    python3 tools/vllm_drift.py /tmp/vllm-0.32.0-*.whl /tmp/vllm-0.33.0-*.whl [--bodies]

OLD and NEW are wheels or folders that hold `vllm/`. Nothing is imported, so neither version need
be installed or fit this machine; needs only the standard library and half a minute. Reports, with
the files of ours that care, what happened to

- each name that our sources import from vLLM or give as text: gone, moved, another signature;
- each class of vLLM's that ours derive from: members that came and went, the signatures and the
  insides of what ours override, call or hook;
- other classes that we use: fields, signatures, members;
- who in vLLM calls what ours override or hook: new calls, and calls with other arguments;
- what else changed inside the modules that we import from, and what loads our entry points.

It cannot see what is chosen at run time, and a change of meaning under the same source.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import re
import sys
import textwrap
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ("kvplug_vllm", "evals/kvplug_evals", "tests/vllm", "tests/stand_ins", "tests/gpu")
ENGINE = "vllm"
ELSEWHERE = re.compile(
    r"^vllm/(models|model_executor/models|distributed/kv_transfer|third_party)/"
)
"""Where methods are called by the same names, on things that ours are not."""
FEW_CALLS = 40
"""Calls of a method by name up to which its callers are compared: more are homonyms."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef | ast.AnnAssign | ast.expr | None


class Tree:
    """The Python of one version."""

    def __init__(self, place: Path) -> None:
        if place.suffix == ".whl":
            with zipfile.ZipFile(place) as wheel:
                names = [n for n in wheel.namelist() if n.startswith("vllm/") and n[-3:] == ".py"]
                self.files = {name: wheel.read(name).decode() for name in names}
        else:
            self.files = {
                file.relative_to(place).as_posix(): file.read_text()
                for file in sorted(place.glob(f"{ENGINE}/**/*.py"))
            }
        if not self.files:
            raise SystemExit(
                f"{place} holds no vllm/: give a wheel of vLLM or a folder that it is unpacked in"
            )

    @cache  # noqa: B019 -- two trees, as long as the process
    def module(self, name: str) -> Module | None:
        path = name.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in self.files:
                return Module(self, name, file, ast.parse(self.files[file]))
        return None

    @cached_property
    def engine(self) -> dict[str, str]:
        """Without models and what serves other things under the same names."""
        return {file: text for file, text in self.files.items() if not ELSEWHERE.match(file)}

    def resolve(self, module: str, name: str) -> Found | None:
        """Where a name that a module offers is defined, through whatever re-exports it."""
        return self._resolve(module, name, frozenset())

    def _resolve(self, module: str, name: str, seen: frozenset[str]) -> Found | None:
        if (here := self.module(module)) is None or module in seen:
            return None
        seen |= {module}
        if name in here.definitions:
            return Found(here, name, here.definitions[name])
        if name in here.imports:
            source, original = here.imports[name]
            if original is not None and (found := self._resolve(source, original, seen)):
                return found
            inner = self.module(source if original is None else f"{source}.{original}")
            return Found(inner, "", None) if inner else None
        for source in here.stars:
            if found := self._resolve(source, name, seen):
                return found
        inner = self.module(f"{module}.{name}")
        return Found(inner, "", None) if inner else None

    def definers(self, name: str) -> list[str]:
        """Modules that define a name at their top."""
        holding = (module_of(file) for file, text in self.files.items() if name in text)
        return [m for m in holding if (found := self.module(m)) and name in found.definitions]


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True, eq=False)
class Module:
    tree: Tree
    name: str
    file: str
    source: ast.Module

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        found: dict[str, Definition] = {}
        for node in top_level(self.source):
            if isinstance(node, Function | ast.ClassDef):
                found[node.name] = node
            else:
                found.update(assigned(node))
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """Local name -> (module, name there or None for the module itself)."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in top_level(self.source):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    found[bound] = (alias.name if alias.asname else bound, None)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found[alias.asname or alias.name] = (self.absolute(node), alias.name)
        return found

    @cached_property
    def stars(self) -> list[str]:
        return [source for name, (source, _) in self.imports.items() if name == "*"] + [
            self.absolute(node)
            for node in top_level(self.source)
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        ]

    def absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".")
        if not self.file.endswith("__init__.py"):
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])


@dataclass(frozen=True)
class Found:
    """What a name stands for; a module itself where it has no name."""

    module: Module
    name: str
    node: Definition

    @property
    def place(self) -> str:
        return f"{self.module.name}.{self.name}" if self.name else self.module.name


@dataclass(frozen=True)
class Member:
    owner: str
    node: Definition
    """None where only some method assigns it to self."""
    above: Member | None = None
    """What it overrides."""

    @property
    def body(self) -> str:
        """Of what a call runs, `super()` followed."""
        return body(self.node) + ("" if self.above is None else "\n" + self.above.body)


def top_level(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when a module or a class body does, conditional ones too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield from top_level(child)


def assigned(node: ast.stmt) -> dict[str, Definition]:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id: node}
    if not isinstance(node, ast.Assign):
        return {}
    return {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}


def members(tree: Tree, found: Found) -> dict[str, Member]:
    """Of a class and its ancestors in vLLM, the nearest definition of each."""
    assert isinstance(found.node, ast.ClassDef)
    above: dict[str, Member] = {}
    for base in reversed(found.node.bases):
        if (parent := class_named(tree, found.module, base)) is not None:
            above |= members(tree, parent)
    own: dict[str, Definition] = {}
    for node in top_level(found.node):
        own |= {node.name: node} if isinstance(node, Function) else assigned(node)
    for inner in ast.walk(found.node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
            and inner.attr not in above
        ):
            own.setdefault(inner.attr, None)
    return above | {name: Member(found.name, node, above.get(name)) for name, node in own.items()}


def class_named(tree: Tree, module: Module, base: ast.expr) -> Found | None:
    name = base.value if isinstance(base, ast.Subscript) else base  # Generic[T] and its like
    if not isinstance(name, ast.Name):
        return None
    found = tree.resolve(module.name, name.id)
    return found if found is not None and isinstance(found.node, ast.ClassDef) else None


def signature(node: Definition) -> str:
    if isinstance(node, Function):
        return f"({ast.unparse(node.args)})"
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node).removeprefix(ast.unparse(node.target))
    return "" if node is None or isinstance(node, ast.ClassDef) else f"= {ast.unparse(node)}"


def body(node: Definition) -> str:
    """Without docstrings, annotations' quotes and comments: what a change of it would run."""
    if not isinstance(node, Function):
        return signature(node)
    plain = copy.deepcopy(node)
    for inner in ast.walk(plain):
        if isinstance(inner, Function | ast.ClassDef) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return "\n".join(ast.unparse(line) for line in [*plain.decorator_list, *plain.body])


@dataclass
class Uses:
    """What our sources take from vLLM."""

    names: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    """(module, name or "") -> our files."""
    derived: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    """(module, class of vLLM's) -> our classes below it and those that these mix in."""
    defined: dict[str, set[str]] = field(default_factory=dict)
    """Our class -> what it defines itself."""
    touched: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Attribute that is read, called or set anywhere of ours -> our files."""
    hooked: set[tuple[str, str]] = field(default_factory=set)
    """(class of vLLM's, method) that ours replace."""


Base = str | tuple[str, str]
"""Of a class of ours: another one's name, or (module, name) of vLLM's."""


def uses(sources: list[Path], old: Tree, new: Tree) -> Uses:
    """Modules and names given as text count where either tree has them."""
    found = Uses()
    bases: dict[str, list[Base]] = {}
    makers: dict[str, list[Base]] = {}  # functions of ours that return classes to derive from
    parsed = {
        file.relative_to(PROJECT).as_posix() if file.is_relative_to(PROJECT) else file.name:
            ast.parse(file.read_text())
        for file in sources
    }  # fmt: skip
    for label, source in parsed.items():
        for node in ast.walk(source):
            if isinstance(node, ast.ImportFrom) and within(node.module) and not node.level:
                for alias in node.names:
                    found.names[node.module or "", alias.name].add(label)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if within(alias.name):
                        found.names[alias.name, ""].add(label)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                module, _, name = node.value.rpartition(".")
                if within(module) and (old.module(node.value) or new.module(node.value)):
                    found.names[node.value, ""].add(label)
                elif within(module) and (old.resolve(module, name) or new.resolve(module, name)):
                    found.names[module, name].add(label)
            elif isinstance(node, ast.Attribute):
                found.touched[node.attr].add(label)
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
                    found.hooked.add((node.value.id, node.attr))
            elif isinstance(node, ast.FunctionDef):
                makers[node.name] = list(imported(node).values())
    for label, source in parsed.items():
        local = imported(source)
        for cls in [node for node in ast.walk(source) if isinstance(node, ast.ClassDef)]:
            key = f"{label}:{cls.name}"
            found.defined[key] = {node.name for node in cls.body if isinstance(node, Function)}
            found.defined[key] |= {name for node in cls.body for name in assigned(node)}
            bases[key] = [base for node in cls.bases for base in named(node, local, makers)]
    for derived in found.defined:
        above = list(ancestors(derived, bases))
        mixins = {base for base in above if isinstance(base, str)}
        for base in above:
            if not isinstance(base, str):
                found.derived[base] |= {derived, *mixins}
    return found


def imported(source: ast.AST) -> dict[str, Base]:
    """vLLM's names in one of our files or functions, by what they are called there."""
    return {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and within(node.module) and not node.level
        for alias in node.names
    }


def named(base: ast.expr, local: dict[str, Base], makers: dict[str, list[Base]]) -> list[Base]:
    if isinstance(base, ast.Starred):
        base = base.value
    if isinstance(base, ast.Call):
        made = base.func.attr if isinstance(base.func, ast.Attribute) else ast.unparse(base.func)
        return makers.get(made, [])
    return [local.get(base.id, base.id)] if isinstance(base, ast.Name) else []


def ancestors(cls: str, bases: dict[str, list[Base]]) -> Iterator[Base]:
    """vLLM's classes as they are, ours by their key."""
    for base in bases.get(cls, []):
        if not isinstance(base, str):
            yield base
            continue
        for key in bases:
            if key.endswith(f":{base}") and key != cls:
                yield key
                yield from ancestors(key, bases)


def within(module: str | None) -> bool:
    return (module or "").partition(".")[0] == ENGINE


@dataclass
class Report:
    rows: dict[str, dict[tuple[str, str], set[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    """Kind -> (what, how) -> files of ours."""
    same: set[str] = field(default_factory=set)
    bodies: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, what: str, how: str, files: Iterable[str] = ()) -> None:
        self.rows[kind][what, how].update(Path(file).name for file in files)


KINDS = {
    "gone": "Gone or moved",
    "signature": "Called in another way: signatures and values of what ours use",
    "calls": "vLLM calls what ours override or hook in another way or place",
    "inherited": "New or gone in classes that ours derive from",
    "inside": "Changed inside: what ours override, call or hook",
    "members": "Other members of classes that ours use",
    "around": "Also changed inside, in modules that ours import from",
}


def compare(old: Tree, new: Tree, used: Uses, groups: list[str]) -> Report:
    report = Report()
    for (module, name), files in sorted(used.names.items()):
        compare_name(old, new, used, report, module, name, files)
    compare_calls(old, new, used, report)
    compare_modules(old, new, used, report, groups)
    return report


def compare_name(
    old: Tree, new: Tree, used: Uses, report: Report, module: str, name: str, files: set[str]
) -> None:
    label = f"{module}.{name}" if name else module
    if not name:
        before, after = (tree.module(module) is not None for tree in (old, new))
        if before != after:
            report.add("gone", label, "module is gone" if before else "is a new module", files)
        return
    first, second = old.resolve(module, name), new.resolve(module, name)
    if first is None:
        report.add("gone", label, "is new" if second else "in neither version", files)
        return
    if second is None:
        now = " and ".join(new.definers(first.name or name)) or "no module"
        report.add("gone", label, f"is gone; now in {now}", files)
        return
    if isinstance(first.node, ast.ClassDef) and isinstance(second.node, ast.ClassDef):
        changed = compare_class(old, new, used, report, (module, name), first, second, files)
    else:
        changed = signature(first.node) != signature(second.node)
        if changed:
            how = difference(first.node, second.node)
            report.add("signature", label, how, files)
        if isinstance(first.node, Function) and body(first.node) != body(second.node):
            changed = True
            inside(report, label, body(first.node), body(second.node), files)
    if not changed:
        report.same.add(name)


def compare_class(
    old: Tree, new: Tree, used: Uses, report: Report, key: tuple[str, str], before: Found,
    after: Found, files: set[str],
) -> bool:  # fmt: skip
    below = used.derived.get(key, set())
    was, now = members(old, before), members(new, after)
    changed = False
    for name in sorted({*was, *now}):
        overriding = {cls.partition(":")[0] for cls in below if name in used.defined[cls]}
        mine = bool(overriding) or (key[1], name) in used.hooked
        touched = used.touched.get(name, set()) & (files | {c.partition(":")[0] for c in below})
        who, ours = overriding or touched or files, mine or bool(touched)
        if name not in now or name not in was:
            gone = name not in now
            member = (was if gone else now)[name]
            if member.node is None and not ours:
                continue  # an attribute that only vLLM's own methods set and read
            kind = "gone" if gone and ours else "inherited" if below or mine else "members"
            how = f"{'is gone' if gone else 'is new'} {signature(member.node)}"
            report.add(kind, f"{member.owner}.{name}", how, who)
            changed = True
            continue
        label, first, second = f"{was[name].owner}.{name}", was[name], now[name]
        if signature(first.node) != signature(second.node):
            kind = "signature" if ours or name == "__init__" else "members"
            how = difference(first.node, second.node)
            report.add(kind, label, how, who)
            changed = True
        elif (mine or (touched and below)) and first.body != second.body:
            inside(report, label, first.body, second.body, who)
            changed = True
    return changed


def inside(report: Report, label: str, before: str, after: str, files: set[str]) -> None:
    lines = [
        line
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]
    more, fewer = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    report.add("inside", label, f"+{more} -{fewer} lines", files)
    report.bodies[label] = "\n".join([f"{label}:", *(f"    {line}" for line in lines)])


def compare_calls(old: Tree, new: Tree, used: Uses, report: Report) -> None:
    """Of methods that ours override or replace, by name: types are not known here."""
    watched = set()
    for key, below in used.derived.items():
        found = old.resolve(*key)
        if found is not None and isinstance(found.node, ast.ClassDef):
            theirs = {name for name, m in members(old, found).items() if is_method(m.node)}
            watched |= {name for cls in below for name in used.defined[cls] & theirs}
    imported = {name for _, name in used.names}
    watched |= {name for cls, name in used.hooked if cls in imported}
    watched = {
        name
        for name in watched
        if not name.startswith("__")
        and 0 < sum(t.count(f".{name}(") for t in new.engine.values()) <= FEW_CALLS
    }
    before, after = callers(old, watched), callers(new, watched)
    for name in sorted(watched):
        known = {function for function, _ in before[name]}
        for function, call in sorted(after[name].keys() - before[name].keys()):
            how = "in another way by" if function in known else "by"
            place = after[name][function, call]
            report.add(
                "calls", name, f"now called {how} {place}: {call}", used.touched.get(name, ())
            )


def is_method(node: Definition) -> bool:
    return isinstance(node, Function) and "property" not in map(ast.unparse, node.decorator_list)


def callers(tree: Tree, watched: set[str]) -> dict[str, dict[tuple[str, str], str]]:
    """Method -> (Class.function, the call) -> with its module, which a mere move changes"""
    found: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for file, text in tree.engine.items():
        if not any(f".{name}(" in text for name in watched):
            continue
        module = tree.module(module_of(file))
        assert module is not None
        for function, node in functions(module.source):
            for call in ast.walk(node):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr in watched
                    and ast.unparse(call.func.value) != "super()"
                ):
                    key = function, ast.unparse(call)
                    found[call.func.attr][key] = f"{module.name}.{function}"
    return found


def functions(node: ast.AST, place: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods as Class.function, not those within them."""
    for child in top_level(node):
        if isinstance(child, Function):
            yield f"{place}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{place}{child.name}.")


def compare_modules(old: Tree, new: Tree, used: Uses, report: Report, groups: list[str]) -> None:
    """The rest of the modules that ours import from, and what names our entry points."""
    ours = {found.module.name for key in used.names if key[1] and (found := old.resolve(*key))}
    loaders = {
        module_of(file)
        for file, text in old.files.items()
        if any(f'"{group}"' in text for group in groups)
    }
    told = {what for what, _ in report.rows["inside"]}
    for name in sorted(ours | loaders):
        first, second = old.module(name), new.module(name)
        if first is None or second is None:
            continue
        before, after = dict(functions(first.source)), dict(functions(second.source))
        changed = [
            place
            for place in before
            if place in after
            and not {place, f"{name}.{place}"} & told
            and body(before[place]) != body(after[place])
        ]
        if changed:
            loads = "loads our entry points: " if name in loaders else ""
            report.add("around", name, loads + ", ".join(changed))


def difference(before: Definition, after: Definition) -> str:
    """Of two functions the arguments that differ, where there are many."""
    was, now = signature(before), signature(after)
    if not (isinstance(before, Function) and isinstance(after, Function)) or len(was + now) < 160:
        return f"{was or '(nothing)'} -> {now or '(nothing)'}"
    first, second = arguments(before), arguments(after)
    parts = [f"+{part}" for part in second if part not in first]
    parts += [f"-{part}" for part in first if part not in second]
    return ", ".join(parts) or "the order of its arguments"


def arguments(function: Function) -> list[str]:
    args = function.args
    named = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(named) - len(args.defaults)) + args.defaults
    pairs = [
        *zip(named, defaults, strict=True),
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
    ]
    found = [ast.unparse(arg) + (f"={ast.unparse(d)}" if d else "") for arg, d in pairs]
    found += [f"*{ast.unparse(args.vararg)}"] if args.vararg else []
    return found + ([f"**{ast.unparse(args.kwarg)}"] if args.kwarg else [])


def print_report(report: Report, names: int, bodies: bool) -> None:
    for kind, title in KINDS.items():
        rows = report.rows.get(kind)
        if not rows:
            continue
        print(f"{title}\n")
        for (what, how), files in sorted(rows.items()):
            print(f"  {what}" + (f"   [{', '.join(sorted(files))}]" if files else ""))
            print(textwrap.indent(textwrap.fill(how, 92), "      "))
        print()
    if bodies and report.bodies:
        print("What changed inside\n")
        print(textwrap.indent("\n".join(report.bodies.values()), "  "), "\n")
    same = ", ".join(sorted(report.same)) or "none"
    print(f"The same, of {names} names:\n{textwrap.indent(textwrap.fill(same, 96), '  ')}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="a wheel of vLLM, or a folder that holds vllm/")
    parser.add_argument("new", type=Path)
    parser.add_argument("--sources", type=Path, nargs="+", help="folders of ours to read")
    parser.add_argument("--bodies", action="store_true", help="print what changed inside, too")
    options = parser.parse_args(arguments)
    folders = options.sources or [PROJECT / source for source in SOURCES]
    files = [file for folder in folders for file in sorted(folder.glob("**/*.py"))]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    groups = [group for group in project["entry-points"] if group.startswith(f"{ENGINE}.")]
    old, new = Tree(options.old), Tree(options.new)
    used = uses(files, old, new)
    print_report(compare(old, new, used, groups), len(used.names), options.bodies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
