"""``kvplug eval``: options in, a sweep of settings, a report out."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvplug.shown import Json, screen, write_json
from kvplug_evals.extras import needed
from kvplug_evals.interrupts import Interrupts


def evaluate(
    engine: Annotated[str, typer.Option(help="vllm or sglang, installed beside kvplug.")] = "vllm",
    model: Annotated[
        str | None, typer.Option(help="recall, smollm2 or a folder; the suite's if none.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy, llmlingua(rate=0.5), engine(kv_cache_dtype=fp8_e5m2) or "
            "engine(sliding_window=512); repeatable. May hold {budget}. The suite's if none; "
            "dense is always there."
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="recall, smoke, scbench, scbench-mini, ruler, published-recall, "
            "published-smollm2, or a YAML file."
        ),
    ] = "recall",
    mode: Annotated[
        list[str] | None, typer.Option(help="multi-turn or multi-request; repeatable.")
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="aware: the compression sees the question. agnostic: the context is compressed "
            "alone, the question is decoded behind it. Repeatable."
        ),
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="golden or own: what later turns quote.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Of a context; repeatable.", min=64)
    ] = None,
    contexts: Annotated[int | None, typer.Option(help="Asked at once.", min=1)] = None,
    turns: Annotated[int | None, typer.Option(min=1, max=5)] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of the context for {budget}; repeatable.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="generated, hub, or a JSONL file in SCBench's schema.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the data.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights and cache: float32, bfloat16, float16; auto is the weights' own, "
            "bfloat16 for those of float32."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents of each of lm-eval's own tasks.", min=1)
    ] = None,
    losses: Annotated[
        bool | None, typer.Option(help="Also force the true answers and take their loss.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Add random and streaming_llm with each policy's budget.")
    ] = True,
    threads: Annotated[int, typer.Option(help="Of the engine.", min=1)] = 1,
    in_process: Annotated[
        bool,
        typer.Option(help="Engines start sooner; reads are then chosen by uncompiled code."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory of results; eval-out/SUITE-MODEL if none.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two directories and run nothing.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a directory's report anew and run nothing.")
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(
            help="Fold a directory's finished settings into one file, results.jsonl, and run "
            "nothing. Reports, comparisons and sweeps that go on read it too."
        ),
    ] = None,
    to: Json = None,
) -> None:
    """What a policy costs in answers, through the engine that serves. Resumes what it began."""
    if os.environ.get("OMP_NUM_THREADS") != str(threads) and in_process:
        # OpenMP reads its environment when torch is loaded, and here it is already.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with needed("kvplug eval", "cli,plot,evals"):
        from kvplug_evals.engines.interface import EngineError
        from kvplug_evals.sweep.compare import as_data, as_table
        from kvplug_evals.sweep.compare import compare as compared
        from kvplug_evals.sweep.plot import draw
        from kvplug_evals.sweep.report import figures, write_report
        from kvplug_evals.sweep.results import finished, results
        from kvplug_evals.sweep.results import pack as packed
        from kvplug_evals.sweep.session import Run, run_sweep
        from kvplug_evals.sweep.settings import changed, expand, read_suite

    failed, interrupts = Console(stderr=True, highlight=False), Interrupts()
    command = shlex.join(["kvplug", *sys.argv[1:]])

    def write(directory: Path, console: Console) -> None:
        file = write_report(directory, draw(results(directory), directory))
        console.print(f"[bold]saved[/]  {file}", soft_wrap=True)

    try:
        if compare is not None:
            rows = compared(*compare)
            with screen(to) as console:
                console.print(as_table(*compare, rows))
            write_json(as_data(rows), to)
            return
        if report is not None:
            with screen(to) as console:
                write(report, console)
            write_json(figures(report), to)
            return
        if pack is not None:
            with screen(to) as console:
                console.print(f"[bold]saved[/]  {packed(pack)}", soft_wrap=True)
            write_json(figures(pack), to)
            return
        chosen = changed(
            read_suite(suite),
            model=model,
            modes=_tuple(mode),
            questions=_tuple(question),
            answers=answers,
            tokens=_tuple(tokens),
            contexts=contexts,
            turns=turns,
            budgets=_tuple(budget),
            data=data,
            seed=seed,
            dtype=dtype,
            limit=limit,
            losses=losses,
        )
        settings = expand(chosen, engine, policy or [], baselines)
        directory = out or Path("eval-out") / f"{chosen.name}-{Path(chosen.model).name}"
        run = Run(
            out=directory,
            command=command,
            threads=threads,
            multiprocess=not in_process,
            check=interrupts.check,
        )
        with screen(to) as console:
            build_models(chosen)
            console.print(f"{len(settings)} settings, results in {directory}")
            try:
                run_sweep(settings, run, console)
            finally:
                if finished(directory) & {setting.name for setting in settings}:
                    write(directory, console)
        write_json(figures(directory), to)
    except (KeyboardInterrupt, EngineError, ValueError, OSError) as error:
        if interrupts.came:
            failed.print(f"stopped; {escape(command)} goes on from here", soft_wrap=True)
            raise typer.Exit(130) from None
        failed.print(f"[bold red]kvplug eval:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def _tuple(values: list[str] | list[int] | list[float] | None) -> tuple[object, ...] | None:
    return tuple(values) if values else None


def build_models(suite: object) -> None:
    """The recall model takes a second; others must be there."""
    from kvplug_evals.models.recall import build_recall_model
    from kvplug_evals.sweep.settings import Suite

    assert isinstance(suite, Suite)
    if suite.model == "recall" and not suite.model_folder.exists():
        build_recall_model(suite.model_folder, **suite.heads)
