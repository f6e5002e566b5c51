"""The function that an answer repeats, as SCBench finds it for ``repoqa``: the first one of the
first code block that has any; else the first block; without a block, the whole answer.

SCBench parses with tree-sitter. Here Python's own parser reads what is Python and whole; of other
languages, and of code that was cut short, headers are searched and braces or indents counted.
"""

from __future__ import annotations

import ast
import re
import textwrap

BLOCK = re.compile(r"^```\w*\s*\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""As SCBench takes it: whole, both fences at the beginning of a line."""
LOOSE_BLOCK = re.compile(r"```(?:\w*[ \t]*\n)?(.*?)(?:```|\Z)", re.DOTALL)
"""Fences anywhere; the last may be missing."""

PYTHON = re.compile(r"^([ \t]*)((?:async[ \t]+)?def[ \t]+\w+)", re.MULTILINE)
NAMED = re.compile(  # Rust, Go and TypeScript
    r"^[ \t]*(?:(?:export|default)\s+)*((?:(?:pub(?:\([^)]*\))?|async|const|unsafe)\s+)*"
    r"(?:fn|func|function)\s+\w+\s*(?:<[^>{]*>)?\s*\()",
    re.MULTILINE,
)
TYPED = re.compile(  # Java and C++
    r"^[ \t]*(?!(?:return|else|new|if|for|while|switch|catch|class|struct)\b)"
    r"((?:[\w@<>\[\],.:?]+[ \t*&]+)+\w+\s*\([^;{}]*\)\s*(?:(?:const|noexcept|throws[^;{}]*)\s*)?"
    r"(?=\{))",
    re.MULTILINE,
)


def first_function(answer: str, *, cut_short: bool) -> str:
    """``cut_short``: whether a block that does not end, or begins inside a line, is one."""
    blocks = (LOOSE_BLOCK if cut_short else BLOCK).findall(answer.strip())
    if not blocks:
        return answer.strip()
    functions = (_function(block) for block in blocks)
    return next((function for function in functions if function), blocks[0].strip("\n"))


def _function(code: str) -> str:
    """The first function in it, or nothing."""
    try:
        tree = ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError):
        return _searched(code)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    if not found:
        return ""
    first = min(found, key=lambda node: node.lineno)
    return ast.get_source_segment(textwrap.dedent(code), first) or ""


def _searched(code: str) -> str:
    headers = [
        (header.start(group), form)
        for form, group in ((PYTHON, 2), (NAMED, 1), (TYPED, 1))
        for header in [form.search(code)]
        if header is not None
    ]
    if not headers:
        return ""
    begin, form = min(headers, key=lambda header: header[0])
    return _indented(code[begin:], code, begin) if form is PYTHON else _braced(code[begin:])


def _indented(function: str, code: str, begin: int) -> str:
    """Until a line that is indented no more than its first; a bracket closes its signature."""
    indent = begin - (code.rfind("\n", 0, begin) + 1)
    first, *rest = function.split("\n")
    lines = [first]
    for line in rest:
        text = line.lstrip()
        if text and len(line) - len(text) <= indent and text[0] not in ")]}":
            break
        lines.append(line)
    return "\n".join(lines).rstrip()


def _braced(function: str) -> str:
    """Until its first brace is closed."""
    depth = 0
    for place, character in enumerate(function):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth <= 0:
            return function[: place + 1]
    return function
