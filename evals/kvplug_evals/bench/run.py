"""python -m kvplug_evals.bench.run OPTIONS: the process that measures, cell after cell."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from itertools import product
from time import monotonic, perf_counter, thread_time

import torch
from rich.console import Console
from rich.markup import escape

from kvplug.shown import progress
from kvplug_evals.bench import report
from kvplug_evals.bench.attention import Cell, Result, WrongOutput, describe
from kvplug_evals.bench.layer import Shape, available_bytes
from kvplug_evals.bench.options import Clock, Heads, Options, Pages
from kvplug_kernels.warm_up import warm_up


def main(text: str) -> int:
    console = Console(highlight=False, stderr=True)
    options = Options.from_json(text)
    for dtype in options.dtype:
        warm_up(getattr(torch, dtype))  # as a served engine's worker does at its start
    try:
        run_bench(options, console)
    except KeyboardInterrupt:
        return 130
    except WrongOutput as error:
        console.print(f"[bold red]wrong output:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def run_bench(options: Options, console: Console) -> None:
    """Writes the JSON anew after every cell. Raises WrongOutput."""
    torch.set_num_threads(options.threads)
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # an engine's first linear layer does; stock attention relies on it
    run = report.Run(options)
    began, cells = monotonic(), list(shapes(options))
    with progress(console, len(cells)) as bar:
        for heads, shape in cells:
            console.print(f"[dim]{monotonic() - began:4.0f} s  {describe(shape)}[/]")
            try:
                run.add(heads.name, measure_cell(options, shape))
            except MemoryError as error:
                run.leave_out(heads.name, shape, str(error))
            run.save()
            bar.advance()
    run.finish()


def shapes(options: Options) -> Iterator[tuple[Heads, Shape]]:
    for heads, dtype, context, batch in product(
        options.heads, options.dtype, options.context, options.batch
    ):
        yield heads, Shape(
            B=batch, T=context, Hq=heads.Hq, H=heads.H, D=heads.D, S=options.block_size,
            dtype=getattr(torch, dtype),
        )  # fmt: skip


def measure_cell(options: Options, shape: Shape) -> Result:
    """Checks the output where the context is the run's shortest: it takes the content twice more.

    Raises WrongOutput, and MemoryError that says what is missing.
    """
    gc.collect()  # the cell before: vLLM's layers and configurations refer to each other
    check = min(options.context) == shape.T
    needed = shape.cache_bytes * (4.5 if check else 2.2)
    available = available_bytes()
    if needed > available:
        raise MemoryError(
            f"both caches need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are free"
        )
    cell = Cell(
        shape,
        options.line,
        shuffled=options.pages is Pages.SHUFFLED,
        clock=thread_time if options.clock is Clock.CPU else perf_counter,
        check=check,
    )
    return cell.measure(options.repeats)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
