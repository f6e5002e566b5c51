"""Commands that measure. ``kvplug`` shows them as its own; alone: python -m kvplug_evals.cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvplug.shown import Json, screen
from kvplug_evals.bench.cli import app as bench
from kvplug_evals.calibration.cli import calibrate
from kvplug_evals.extras import needed
from kvplug_evals.interrupts import Interrupts
from kvplug_evals.sweep.cli import evaluate
from kvplug_evals.xray.cli import xray

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
app.command(name="eval")(evaluate)
app.command()(xray)
app.command()(calibrate)


@app.command()
def demo(
    engine: Annotated[str, typer.Option(help="vllm, or sglang in its own environment.")] = "vllm",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy beside dense, such as 'quest(budget=512)'; may be repeated."),
    ] = None,
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path(".models/smollm2"),
    out: Annotated[Path, typer.Option(help="Folder for plot, results and logs.")] = Path(
        "demo-out"
    ),
    kv_cache_mib: Annotated[
        int | None,
        typer.Option(help="KV cache of every server, in MiB: 256, for sglang 112.", min=1),
    ] = None,
    enforce_eager: Annotated[
        bool | None,
        typer.Option(help="vLLM starts sooner, as here; --no-enforce-eager compiles."),
    ] = None,
    to: Json = None,
) -> None:
    """Serve one long conversation under several policies and compare them. Takes minutes."""
    with needed("the demo", "cli,plot,evals"):
        from kvplug_evals.demo.report import NothingSaved
        from kvplug_evals.demo.session import run_demo
        from kvplug_evals.engines.interface import EngineError
        from kvplug_evals.served.choose import configure

    failed, interrupts = Console(stderr=True, highlight=False), Interrupts()
    try:
        options = {"kv_cache_mib": kv_cache_mib, "enforce_eager": enforce_eager}
        chosen = configure(engine, model, options)
        with screen(to) as console:
            run_demo(policy or [], chosen, out, console, interrupts.check, to=to)
    except (KeyboardInterrupt, EngineError, NothingSaved, ValueError, OSError) as error:
        if interrupts.came:
            failed.print("stopped; no server is left running")
            raise typer.Exit(130) from None
        failed.print(f"[bold red]kvplug demo:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app.callback()(lambda: None)  # without one, typer takes a lone command for the program
    app()
