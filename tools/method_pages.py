"""docs/methods: a page for each policy, of its docstring, options and what was published of it.

    python tools/method_pages.py

tests/core/test_docs.py fails where a page is stale.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

from kvplug.advice.published import Row, published
from kvplug.grammar import parse
from kvplug.policy import Policy
from kvplug.registry import policy_class, policy_names

FOLDER = Path(__file__).parents[1] / "docs/methods"
LINES = {
    "pyramid": "pyramid(snapkv(budget=1024))",
    "chunkkv": "chunkkv(snapkv(budget=1024))",
    "duo": 'duo(snapkv(budget=1024), heads="heads.json")',
    "local": 'local(layers="1::2")',
    "host": "host(pages=64) + quest(budget=1024, dense_layers=0)",
}
"""For policies that cannot be written by their name alone."""
VLLM_ALONE = {"host", "kvzip", "local"}
NOT_WHEN = {
    "dense": "where memory or a step's reads are what limits the server.",
    "twilight": "for more requests at once: it holds the whole cache and 9.4 % more; contexts "
    "below some 8K tokens have nothing to save.",
    "quest": "where every page looks alike: its bounds are loose on keys without structure, and "
    "at the same bytes twilight finds more. It holds the whole cache.",
    "streaming_llm": "where answers lie outside the window: what left it is gone.",
    "local": "on a model that was not trained for it, without measuring which layers can spare "
    "what they fetched from afar.",
    "snapkv": "where later turns ask something else before their own prompt is packed, or where "
    "many requests share one context: each adds private blocks to it.",
    "keydiff": "for long answers packed on the way, where it loses more than tokens drawn by lot.",
    "knorm": "on text: of all policies it was the worst there.",
    "random": "at all, but to compare with.",
    "random_prefill": "at all, but to compare with.",
    "kivi": "at two bits without having measured it: loss grows steeply below four.",
    "pyramid": "where the last layers look things up: they are given least.",
    "duo": "with a file that was calibrated on nothing like what you serve, or where a layer has "
    "one KV head or two: there is little to share out.",
    "kvzip": "for contexts that few ask about, or that hold what cannot be foretold: those need "
    "all of it.",
    "blend": "where chunks speak of one another: what is taken of one never saw those before it.",
    "host": "for many requests at a time: each brings an eighth or so of what it reads from the "
    "host in every step and layer, and they share one bus; nor for prompts that the pool does not "
    "hold while they are computed.",
    "a_shape": "where a prompt's middle is asked about far from its end.",
    "tri_shape": "where a prompt's middle is asked about before its last tokens.",
    "xattention": "on models with attention sinks, or text that repeats itself, where it loses "
    "more.",
    "minference": "where turns share prefixes: what it leaves depends on the question, and no "
    "other request finds it.",
    "flexprefill": "where turns share prefixes: what it leaves depends on the question, and no "
    "other request finds it.",
    "block_quest": "where xattention can be had: at the same reads it loses more.",
}

UNTOLD = "before you have measured it: no loss on real text was published yet."


def page(name: str) -> str:
    cls = policy_class(name)
    module = importlib.import_module(cls.__module__)
    first, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n")
    line = str(parse(LINES.get(name, name)))
    parts = [
        f"# {name}\n\n{first}",
        _formula(rest),
        _facts(cls),
        f"## Its line\n\n{_commands(name, line)}",
        f"## Options\n\n{_options(cls)}",
        f"## What was measured\n\n{_measured(name)}",
        f"## When not to use it\n\nNot {NOT_WHEN.get(name, UNTOLD)}",
    ]
    return "\n\n".join(parts) + "\n"


def _formula(rest: str) -> str:
    """The docstring's own paragraphs: those that are indented stay as they stand."""
    return rest.strip("\n").replace("``", "`")


def _facts(cls: type[Policy]) -> str:
    rows = {
        "stage": cls.stage.value,
        "what it does": cls.action.value,
        "by": cls.granularity.value,
        "looks at": cls.evidence.value,
        "keeps": cls.memory,
        "a decode step reads": cls.reads,
        "whom its pages may serve": "anyone with the same tokens and policy"
        if cls.query_agnostic
        else "see [what requests share](../requests.md)",
        "source": f"<{cls.paper}>" if cls.paper.startswith("http") else cls.paper or "none",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"| | |\n|---|---|\n{table}"


def _commands(name: str, line: str) -> str:
    line = line.replace("'", '"')  # a shell's quotes stand around it
    quoted = line.replace('"', '\\"')
    vllm = (
        "    vllm serve MODEL --attention-backend kvplug \\\n"
        f'        --additional-config \'{{"kvplug": {{"policy": "{quoted}"}}}}\''
    )
    if name in VLLM_ALONE:
        return f"{vllm}\n\nvLLM alone."
    return (
        f"{vllm}\n\n    python -m sglang.launch_server --model-path MODEL "
        f"--attention-backend kvplug \\\n        --kvplug-policy '{line}'"
    )


def _options(cls: type[Policy]) -> str:
    found = [f"| `{field.name}` | {_default(field)} | {_said(cls, field.name)} |"
             for field in fields(cls) if field.init]  # fmt: skip
    if not found:
        return "None."
    return "| option | default | |\n|---|---|---|\n" + "\n".join(found)


def _default(field: object) -> str:
    value = getattr(field, "default", MISSING)
    return "needed" if value is MISSING else f"`{value!r}`"


def _said(cls: type, name: str) -> str:
    """The string that stands behind a field's line, in the class that states it first."""
    for base in cls.__mro__:
        if name not in inspect.get_annotations(base):
            continue
        lines = inspect.getsource(base).split("\n")
        for number, line in enumerate(lines):
            if line.startswith(f"    {name}:") and '"""' in "".join(
                lines[number + 1 : number + 2]
            ):
                text = "\n".join(lines[number + 1 :]).split('"""')[1]
                return " ".join(textwrap.dedent(text).split()).replace("``", "`")
    return ""


def _measured(name: str) -> str:
    rows = list(_rows(name))
    if not rows:
        return (
            "No loss on real text was published yet; what there is stands in "
            "[what was measured](../evidence.md)."
        )
    table = [
        f"| `{row.policy}` | {row.task} | {row.tokens:,} | {_result(row)} | `{row.source}` |"
        for row in rows
    ]
    head = "| line | task | tokens | over dense | source |\n|---|---|---|---|---|\n"
    return (
        f"{head}" + "\n".join(table) + "\n\nNats are of the true answer's tokens, above zero "
        "worse than dense; look-ups are exact recall's, of which dense finds all. SmolLM2-135M "
        "and a hand-built recall model on a CPU: an indication, and no promise for yours."
    )


def _rows(name: str) -> Iterator[Row]:
    for row in published():
        if not row.policy.startswith("engine("):
            line = parse(row.policy)
            parts = [part.name for policy in line for part in policy.parts]
            coded = line.format is not None and line.format.name == name
            if coded or (parts[0] == name and "+" not in row.policy):
                yield row


def _result(row: Row) -> str:
    return f"{row.loss:+.2f} nats" if row.loss is not None else f"{row.found:.0%} of look-ups"


def index() -> str:
    rows = [
        f"| [{name}]({name}.md) | {policy_class(name).stage.value} | "
        f"{policy_class(name).memory} | {policy_class(name).reads} |"
        for name in own_names()
    ]
    head = "| method | stage | the cache holds | a decode step reads |\n|---|---|---|---|\n"
    return (
        "# Methods\n\nOne page each, of the file that computes it: formula, what it keeps and "
        "reads, what was measured, when not to use it, and the line for both engines. "
        "[Policies](../policies.md) says how lines are written and composed.\n\n"
        f"{head}" + "\n".join(rows) + "\n"
    )


def own_names() -> list[str]:
    """Policies of this project; others may be installed."""
    return [n for n in policy_names() if policy_class(n).__module__.startswith("kvplug.policies.")]


def pages() -> dict[str, str]:
    return {"index": index(), **{name: page(name) for name in own_names()}}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / f"{name}.md").write_text(text)
