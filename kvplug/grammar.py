"""The line that names an experiment, read and checked.

    dense
    streaming_llm(sinks=4, window=1020)
    streaming_llm(window=4096) + quest(budget=1024, top_p=0.95)

``+`` fills stages; a policy inside a policy's parentheses is wrapped by it. The line is a
Python expression, so it is read by Python's own parser and never evaluated.
"""

from __future__ import annotations

import ast
from dataclasses import MISSING, fields

from kvplug.composition import Composition
from kvplug.policy import Policy
from kvplug.registry import did_you_mean, policy_class

LONGEST = 4000  # characters
EXAMPLE = "write, for example, 'quest(budget=2048)' or 'streaming_llm(sinks=4, window=1020)'"


def parse(line: str) -> Composition:
    """A policy line -> what it names. Raises ValueError that says what to write instead."""
    if not isinstance(line, str) or not line.strip():
        raise ValueError(f"a policy must be a line of text, got {line!r}; {EXAMPLE}")
    if len(line) > LONGEST:
        raise ValueError(
            f"a policy must be a line of at most {LONGEST:,} characters, got {len(line):,}; "
            f"{EXAMPLE}"
        )
    try:
        tree = ast.parse(line.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"cannot read the policy {line!r}: {error.msg} at column {error.offset}; {EXAMPLE}"
        ) from None
    return Composition(tuple(_policy(term, line) for term in _terms(tree)))


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left) + _terms(node.right)
    return [node]


def _policy(node: ast.expr, line: str) -> Policy:
    if isinstance(node, ast.Name):
        return _build(node.id, [], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        wrapped = [_policy(argument, line) for argument in node.args]
        options: dict[str, object] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError(f"cannot read '**' in the policy {line!r}; {EXAMPLE}")
            if keyword.arg in options:
                raise ValueError(f"{node.func.id} got {keyword.arg!r} twice; keep one of them")
            options[keyword.arg] = _value(keyword.value, keyword.arg, node.func.id)
        return _build(node.func.id, wrapped, options)
    raise ValueError(
        f"cannot read {ast.unparse(node)!r} in the policy {line!r}: wanted name(option=value) "
        f"joined by '+'; {EXAMPLE}"
    )


def _value(node: ast.expr, option: str, name: str) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name}: {option} must be a plain value (a number, True, None, 'text'), "
            f"got {ast.unparse(node)!r}"
        ) from None


def _build(name: str, wrapped: list[Policy], options: dict[str, object]) -> Policy:
    cls = policy_class(name)
    known = {f.name: f for f in fields(cls) if f.init}
    for option in options:
        if option not in known:
            if not known:
                raise ValueError(f"{name} takes no options, got {option!r}; write {name!r}")
            raise ValueError(
                f"{name} has no option {option!r}.{did_you_mean(option, sorted(known))}"
            )
    if wrapped:
        if "base" not in known or len(wrapped) > 1:
            raise ValueError(
                f"{name} does not wrap another policy, got {', '.join(map(str, wrapped))!r} "
                f"without a name; write {name}(option=value) and join policies by '+'"
            )
        options["base"] = wrapped[0]
    missing = [
        f.name
        for f in known.values()
        if f.default is MISSING and f.default_factory is MISSING and f.name not in options
    ]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}; write {name}({missing[0]}=…)")
    return cls(**options)
