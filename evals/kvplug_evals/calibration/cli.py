"""``kvplug calibrate``: a file of what each head of a model looks at."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvplug_evals.calibration.measure import TEXT, Setting
from kvplug_evals.calibration.measure import calibrate as measure


def calibrate(
    model: Annotated[str, typer.Argument(help="Model folder or name.")],
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="To read; Python's documentation if none."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("heads.json"),
    contexts: Annotated[int, typer.Option(help="Parts of the text that are read.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 4096,
    density: Annotated[float, typer.Option(help="Share of it that each pattern reads.")] = 0.125,
    sinks: Annotated[int, typer.Option(help="First tokens that all patterns read.")] = 128,
    window: Annotated[int, typer.Option(help="Last tokens that are near.")] = 256,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
) -> None:
    """Measure what each of a model's heads looks at, by transformers in float32, for policies that
    treat heads by kind, such as minference(heads='heads.json')."""
    began = perf_counter()
    setting = Setting(
        contexts=contexts, context=context, density=density, sinks=sinks, window=window
    )
    out.parent.resolve(strict=True)  # now, and not when all is measured

    def tell(done: int, every: int) -> None:
        print(f"\r{done} of {every} layers", end="", file=sys.stderr, flush=True)

    found = measure(
        model, None if text is None else text.read_text(), setting, device=device,
        source=TEXT if text is None else text.name, tell=tell,
    )  # fmt: skip
    print(file=sys.stderr)
    found.save(out)
    group = found.shape.heads // found.shape.kv_heads
    chosen = [
        pattern
        for layer in sorted(found.layers)
        for pattern in found.patterns(layer * found.shape.kv_heads, found.shape.kv_heads, group)
    ]
    print(f"{found.model}: {found.shape}")
    table = Table(box=box.SIMPLE)
    for column in ("pattern", "best for KV heads", "recall, mean", "least"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for pattern in found.layers[min(found.layers)].recall:
        each = [share for layer in found.layers.values() for share in layer.recall[pattern]]
        mean, least = sum(each) / len(each), min(each)
        table.add_row(pattern, str(chosen.count(pattern)), f"{mean:.3f}", f"{least:.3f}")
    Console().print(table)
    lost = sorted(share for layer in found.layers.values() for share in layer.lost)
    far = sorted(share for layer in found.layers.values() for share in layer.outside)
    print(
        f"attention outside the first {sinks} and the last {window} tokens: {far[0]:.1%} to "
        f"{far[-1]:.1%} of a KV head's, {far[len(far) // 2]:.1%} in the middle\n"
        f"output that changes without it: {lost[0]:.1%} to {lost[-1]:.1%}, "
        f"{lost[len(lost) // 2]:.1%} in the middle\n"
        f"{out}: {len(chosen)} KV heads ({perf_counter() - began:.0f} s)"
    )
