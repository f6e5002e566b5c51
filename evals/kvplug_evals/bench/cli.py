"""``kvplug bench``: options in, processes with their threads set, tables out."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvplug.shown import Json, screen, write_json
from kvplug_evals.bench import compression as bench_compression
from kvplug_evals.bench.options import Clock, Dtype, Options, Pages, Policy, read_heads
from kvplug_evals.extras import needed
from kvplug_evals.interrupts import Interrupts

COMPRESSING = (
    "snapkv(budget=512)", "keydiff(budget=512)", "knorm(budget=512)", "random(budget=512)"
)  # fmt: skip

READING = (
    "a_shape(window=1024, last=0)",
    "xattention(threshold=None, budget=2048, last=0)",
    "block_quest(budget=2048, last=0)",
)

app = typer.Typer(
    help="Benchmarks.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def bench() -> None:
    """Benchmarks on this machine: of single parts, and of whole servers."""


@app.command()
def attention(
    threads: Annotated[int, typer.Option(help="Of torch and OpenMP.", min=1)] = 2,
    batch: Annotated[
        list[int] | None, typer.Option(help="Requests; repeatable. 1 and 4 if none.", min=1)
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Cached tokens of each; repeatable. 8K, 32K, 128K if none.", min=1),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="smollm2, llama-8b or QUERY/KV/DIM; repeatable. Both if none."),
    ] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Repeatable. Both if none.")] = None,
    budget: Annotated[int, typer.Option(help="Tokens that a policy reads.", min=1)] = 2048,
    policy: Annotated[Policy, typer.Option(help="What reads them.")] = Policy.QUEST,
    candidates: Annotated[
        float | None, typer.Option(help="Of twilight: the share of pages that it scores.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a cache block.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Counted pairs of calls.", min=7)] = 9,
    pages: Annotated[
        Pages, typer.Option(help="shuffled: a pool in use. in-order: a fresh engine.")
    ] = Pages.SHUFFLED,
    clock: Annotated[
        Clock, typer.Option(help="cpu: of the thread alone, where others use the machine.")
    ] = Clock.WALL,
    out: Annotated[Path, typer.Option(help="JSON file; the table goes beside it.")] = Path(
        "results/bench/attention-cpu.json"
    ),
    to: Json = None,
) -> None:
    """One decode step of one layer: vLLM's stock CPU_ATTN against a policy. Takes minutes."""
    if find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here; install it with: pip install 'kvplug[vllm]'")
    try:
        options = Options(
            threads=threads,
            batch=batch or [1, 4],
            context=context or [8192, 32768, 131072],
            heads=[read_heads(name) for name in heads or ["smollm2", "llama-8b"]],
            dtype=dtype or [Dtype.FP32, Dtype.BF16],
            budget=budget,
            policy=policy,
            candidates=candidates,
            block_size=block_size,
            repeats=repeats,
            pages=pages,
            clock=clock,
            out=out,
            command=shlex.join(["kvplug", "bench", "attention", *given("attention")]),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    # OpenMP reads its environment when torch is loaded, and here it is already.
    _measure("run", options.as_json(), threads, out, to)


@app.command()
def prefill(
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable. Three that read prompts sparsely, if none."),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a prompt; repeatable. 8K, 16K, 32K if none.", min=64),
    ] = None,
    chunk: Annotated[int, typer.Option(help="Queries of a prefill step.", min=64)] = 1024,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="smollm2, llama-8b or QUERY/KV/DIM; repeatable. smollm2 if none."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of queries and cache.")] = Dtype.FP32,
    block_size: Annotated[int, typer.Option(help="Tokens of a cache block.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Counted pairs of calls.", min=3)] = 5,
    threads: Annotated[int, typer.Option(help="Of torch and OpenMP.", min=1)] = 2,
    clock: Annotated[
        Clock, typer.Option(help="cpu: of the thread alone, where others use the machine.")
    ] = Clock.WALL,
    out: Annotated[Path, typer.Option(help="JSON file; the table goes beside it.")] = Path(
        "results/bench/prefill-cpu.json"
    ),
    to: Json = None,
) -> None:
    """A chunk of a prompt in one layer: vLLM's stock CPU_ATTN against policies. Takes minutes."""
    if find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here; install it with: pip install 'kvplug[vllm]'")
    from kvplug_evals.bench import prefill as bench_prefill

    try:
        options = bench_prefill.Options(
            policies=policy or list(READING),
            context=context or [8192, 16384, 32768],
            chunk=chunk,
            heads=[read_heads(name) for name in heads or ["smollm2"]],
            dtype=dtype,
            block_size=block_size,
            repeats=repeats,
            threads=threads,
            clock=clock,
            out=out,
            command=shlex.join(["kvplug", "bench", "prefill", *given("prefill")]),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _measure("prefill", options.as_json(), threads, out, to)


@app.command()
def compression(
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable. The four that compress, with a budget of 512, if none."),
    ] = None,
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path(".models/smollm2"),
    tokens: Annotated[int, typer.Option(help="Of a prompt.", min=1)] = 4000,
    chunk: Annotated[int, typer.Option(help="Most tokens of a prefill step.", min=1)] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens of a cache block.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Counted pairs of requests.", min=3)] = 7,
    threads: Annotated[int, typer.Option(help="Of torch and OpenMP.", min=1)] = 2,
    clock: Annotated[
        Clock, typer.Option(help="cpu: of one thread alone, where others use the machine.")
    ] = Clock.WALL,
    out: Annotated[Path, typer.Option(help="JSON file; the table goes beside it.")] = Path(
        "results/bench/compression-cpu.json"
    ),
    to: Json = None,
) -> None:
    """A whole engine: what compressing a prompt costs of its time to first token. Minutes."""
    if find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here; install it with: pip install 'kvplug[vllm]'")
    # The engines are processes that start with this environment.
    os.environ.update(environment(threads), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    try:
        options = bench_compression.Options(
            policies=policy or list(COMPRESSING),
            model=model,
            tokens=tokens,
            chunk=chunk,
            block_size=block_size,
            repeats=repeats,
            threads=threads,
            clock=clock,
            out=out,
            command=shlex.join(["kvplug", "bench", "compression", *given("compression")]),
        )
        with screen(to) as console:
            bench_compression.run(options, console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _copy(out, to)


@app.command()
def decode(
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Beside dense; repeatable. quest and twilight at two budgets if none."),
    ] = None,
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path(".models/smollm2"),
    fit: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of prompts to learn from; repeatable. 1K, 3K, 6K if none."),
    ] = None,
    judge: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of prompts to hold it against; 2K, 4K and 7,936 if none."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests at once in one more cell.", min=2)] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens of a cache block.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Counted pairs of answers.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Of torch and OpenMP.", min=1)] = 2,
    clock: Annotated[
        Clock, typer.Option(help="cpu: of one thread alone, where others use the machine.")
    ] = Clock.WALL,
    out: Annotated[Path, typer.Option(help="JSON file; the table goes beside it.")] = Path(
        "results/bench/decode-cpu.json"
    ),
    to: Json = None,
) -> None:
    """Decode steps of whole engines: the pace that kvplug plan --pace reckons with. Minutes."""
    if find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here; install it with: pip install 'kvplug[vllm]'")
    with needed("kvplug bench decode", "cli,evals"):
        from kvplug_evals.bench import decode as bench_decode
        from kvplug_evals.bench.provenance import WIDTH
    # The engines are processes that start with this environment.
    os.environ.update(environment(threads), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    try:
        options = bench_decode.Options(
            policies=policy or bench_decode.LINES,
            model=model,
            fit=fit or [1024, 3072, 6144],
            judge=judge or [2048, 4096, 7936],
            batch=batch,
            dtype=dtype,
            block_size=block_size,
            repeats=repeats,
            threads=threads,
            clock=clock,
            out=out,
            command=shlex.join(["kvplug", "bench", "decode", *given("decode")]),
        )
        with screen(to) as console:
            done = bench_decode.run(options, Console(stderr=True), bench_decode.save)
            console.width = max(console.width, WIDTH)
            bench_decode.show(done, console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _copy(out, to)


@app.command()
def serve(
    engine: Annotated[str, typer.Option(help="vllm, or sglang in its own environment.")] = "vllm",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Beside dense; repeatable. Two that select, one that evicts, if none."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Model folder. A recall model with an 8B Llama's heads if none."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of a prompt.", min=256)] = 8192,
    output: Annotated[int, typer.Option(help="Tokens of an answer.", min=4)] = 64,
    batch: Annotated[int, typer.Option(help="Requests that always run together.", min=1)] = 4,
    requests: Annotated[
        int, typer.Option(help="Sent at once where few fit; 0 leaves that load out.", min=0)
    ] = 16,
    turns: Annotated[
        int,
        typer.Option(help="Of --batch clients over one context; 0 leaves that load out.", min=0),
    ] = 0,
    fit: Annotated[
        float, typer.Option(help="Dense requests that the pool of every server holds.", min=2)
    ] = 6,
    repeats: Annotated[int, typer.Option(help="Counted runs of each load.", min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int, typer.Option(help="Of each server.", min=1)] = 2,
    enforce_eager: Annotated[
        bool | None,
        typer.Option(help="vLLM starts sooner, as here; --no-enforce-eager compiles."),
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file; table, plot and logs beside it.")] = Path(
        "results/bench/serve-cpu.json"
    ),
    to: Json = None,
) -> None:
    """Whole servers under the engine's own load generator: dense against policies. Minutes."""
    with needed("kvplug bench serve", "cli,plot,evals"):
        from kvplug_evals.bench import serve as bench_serve
        from kvplug_evals.bench.prompts import recall_8b
        from kvplug_evals.bench.provenance import WIDTH
        from kvplug_evals.bench.serve_report import save, show
        from kvplug_evals.served.choose import check_model, configure, policies

    with _servers("serve"):
        chosen = {"dtype": dtype, "threads": threads, "enforce_eager": enforce_eager}
        served = configure(engine, model or recall_8b(Path(".models")), chosen)
        check_model(served.model)
        options = bench_serve.Options(
            policies=policies(policy or bench_serve.POLICIES),
            tokens=tokens,
            output=output,
            batch=batch,
            requests=requests,
            turns=turns,
            fit=fit,
            repeats=repeats,
            out=out,
            command=shlex.join(["kvplug", "bench", "serve", *given("serve")]),
        )
        with screen(to) as console:
            done = bench_serve.run(options, served, console, save)
            console.width = max(console.width, WIDTH)
            show(done, console)
        _copy(out, to)


@app.command()
def idle(
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy, or 'POLICY on HOST' with a format of pages in host memory, plain, or "
            "stock for vLLM's own on a GPU; beside dense without any; repeatable. Six if none."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Model folder. A recall model with an 8B Llama's heads if none."),
    ] = None,
    sessions: Annotated[int, typer.Option(help="That lie idle in turn.", min=2)] = 8,
    tokens: Annotated[int, typer.Option(help="Of each context.", min=256)] = 2048,
    output: Annotated[int, typer.Option(help="Tokens of an answer.", min=4)] = 16,
    fit: Annotated[
        float, typer.Option(help="Dense sessions that the pool of every server holds.", min=1)
    ] = 2,
    host_fit: Annotated[
        float, typer.Option(help="Plain sessions that host memory holds, where there is any.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int, typer.Option(help="Of each server.", min=1)] = 2,
    enforce_eager: Annotated[
        bool | None,
        typer.Option(help="vLLM starts sooner, as here; --no-enforce-eager compiles."),
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file; table and logs beside it.")] = Path(
        "results/bench/idle-cpu.json"
    ),
    to: Json = None,
) -> None:
    """Sessions that lie idle in vLLM: what is kept of each, and its next turn. Minutes."""
    with needed("kvplug bench idle", "cli,plot,evals"):
        from kvplug_evals.bench import idle as bench_idle
        from kvplug_evals.bench.prompts import recall_8b
        from kvplug_evals.bench.provenance import WIDTH
        from kvplug_evals.served.choose import check_model, configure

    with _servers("idle"):
        chosen = {"dtype": dtype, "threads": threads, "enforce_eager": enforce_eager}
        served = configure("vllm", model or recall_8b(Path(".models")), chosen)
        check_model(served.model)
        options = bench_idle.Options(
            cases=bench_idle.cases(case or bench_idle.CASES),
            sessions=sessions,
            tokens=tokens,
            output=output,
            fit=fit,
            host_fit=host_fit,
            out=out,
            command=shlex.join(["kvplug", "bench", "idle", *given("idle")]),
        )
        with screen(to) as console:
            done = bench_idle.run(options, served, console, bench_idle.save)
            console.width = max(console.width, WIDTH)
            bench_idle.show(done, console)
        _copy(out, to)


@contextmanager
def _servers(command: str) -> Iterator[None]:
    """While they run: what stops them is said, and leaves none behind."""
    from kvplug_evals.engines.interface import EngineError

    interrupts = Interrupts()
    failed = Console(stderr=True, highlight=False)
    try:
        yield
    except (KeyboardInterrupt, EngineError, ValueError, OSError) as error:
        if interrupts.came:
            failed.print("stopped; no server is left running")
            raise typer.Exit(130) from None
        failed.print(f"[bold red]kvplug bench {command}:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def _measure(part: str, options: str, threads: int, out: Path, to: Path | None) -> None:
    """A process that measures, with its threads set."""
    command = [sys.executable, "-m", f"kvplug_evals.bench.{part}", options]
    with screen(to):
        done = subprocess.run(command, env=os.environ | environment(threads))
    if not done.returncode:
        _copy(out, to)
    raise typer.Exit(done.returncode)


def _copy(out: Path, to: Path | None) -> None:
    """What a benchmark saved, where --json says."""
    write_json(json.loads(out.read_text()), to)


def given(command: str) -> list[str]:
    """The options as they were typed."""
    return sys.argv[sys.argv.index(command) + 1 :] if command in sys.argv else []


def environment(threads: int) -> dict[str, str]:
    """Of the process that measures."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


if __name__ == "__main__":
    app()
