"""``kvplug``: what is installed, what would be refused, what it costs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated

from kvplug import __version__
from kvplug.compiling import Server
from kvplug.doctor import Check
from kvplug.new_method import write as write_method
from kvplug.registry import policy_class, policy_names

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kvplug.advice.cli import plan
    from kvplug.shown import STDOUT, Json, printing_to_stderr, progress, write_json
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the command kvplug needs {error.name}; install it with: pip install 'kvplug[cli]'"
    ) from None

app = typer.Typer(
    help=f"KV-cache policies for vLLM and SGLang. Version {__version__}.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(plan)


@app.command()
def policies(to: Json = None) -> None:
    """List the installed policies and what each does to the cache."""
    write_json([_described(name) for name in policy_names()], to)
    if to == STDOUT:
        return
    table = Table(
        title="policies",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption="combine one of each stage with '+'",
    )
    for column in (
        "policy",
        "stage",
        "action",
        "unit",
        "query-agnostic",
        "memory",
        "reads",
        "paper",
    ):
        table.add_column(column, overflow="fold", no_wrap=column in ("policy", "paper"))
    for name in policy_names():
        described = _described(name)
        agnostic = "yes" if described.pop("query_agnostic") else "no"
        name, stage, action, unit, memory, reads, paper = map(str, described.values())
        paper = paper.removeprefix("https://")
        table.add_row(name, stage, action, unit, agnostic, memory, reads, paper)
    # Wide enough for its words where nobody looks (a pipe is taken for 80 columns).
    Console(width=max(Console().width, 124)).print(table)


def _described(name: str) -> dict[str, object]:
    cls = policy_class(name)
    return {
        "policy": name,
        "stage": cls.stage.value,
        "action": cls.action.value,
        "unit": cls.granularity.value,
        "query_agnostic": cls.query_agnostic,
        "memory": cls.memory,
        "reads": cls.reads,
        "paper": cls.paper,
    }


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Model folder or name: say what would be refused for it.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy line to check with the model; the default if none.")
    ] = None,
    to: Json = None,
) -> None:
    """Check versions, hooks (by using them) and, with a model, what would be refused."""
    checks: Callable[[str | None, str | None], Iterable[Check]]
    if find_spec("vllm") is not None:
        from kvplug_vllm.doctor import examine as checks
    elif find_spec("sglang") is not None:
        from kvplug_sglang.doctor import checks
    else:
        raise SystemExit(
            "no engine is installed here; install one with: pip install 'kvplug[vllm]'"
        )

    with printing_to_stderr():
        found = list(checks(model, policy))
    write_json([asdict(check) for check in found], to)
    if to != STDOUT:
        table = Table(title="kvplug doctor", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in found:
            passed = "[green]ok[/]" if check.passed else "[red]no[/]"
            table.add_row(passed, check.name, check.detail)
        Console().print(table)
    if not all(check.passed for check in found):
        raise typer.Exit(1)


@app.command(name="new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Of the policy, such as my_method.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make; the name if none.")] = None,
) -> None:
    """Write a package of one policy with its test and its entry point: it runs as it is."""
    folder = out or Path(name)
    for file in write_method(name, folder):
        print(file)
    print(
        f"next:\n  pip install -e {folder}\n  python -m pytest {folder}\n"
        f'  KVPLUG_POLICY="{name}(budget=1024)" vllm serve MODEL --attention-backend kvplug'
    )


@app.command(name="compile")
def compile_context(
    file: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The context's text.")],
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://localhost:8000",
    role: Annotated[
        str | None,
        typer.Option(
            help="Of a conversation's first message that begins so, such as system; without it a "
            "prompt of plain completions."
        ),
    ] = None,
    to: Json = None,
) -> None:
    """Let a server read a context once for everyone: what its policy keeps serves later requests
    that begin with it, for as long as its prefix cache has room."""
    began = perf_counter()
    with progress(Console(stderr=True)) as bar:
        bar.say("chunks")
        found = Server(url).compile(file.read_text(), role, bar.reach)
    seconds = perf_counter() - began
    write_json({**vars(found), "seconds": seconds}, to)
    compiled = found.chunks * found.chunk
    print(
        f"{found.policy}: {found.tokens:,} tokens, of which {compiled:,} were compiled in "
        f"{found.chunks:,} chunks of {found.chunk:,}: {found.blocks:,} blocks before, "
        f"{found.kept:,} now ({seconds:.1f} s)",
        file=sys.stderr if to == STDOUT else None,
    )
    if not found.chunks:
        raise ValueError(
            f"a context of {found.tokens:,} tokens has no whole chunk of {found.chunk:,}; serve a "
            "policy of smaller chunks"
        )


def main() -> None:
    """The console script. Commands of ``kvplug_evals`` join when it is there."""
    if find_spec("kvplug_evals") is not None and find_spec("kvplug_evals.cli") is not None:
        from kvplug_evals.cli import app as evals

        app.add_typer(evals)
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
