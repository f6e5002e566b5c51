"""``kvplug calibrate``: what each head of a model looks at, or the smallest budget that loses less
than a bound; either on one's own text, into a file."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvplug.heads import Heads
from kvplug.shown import Json, progress, screen, write_json
from kvplug_evals.calibration import measure
from kvplug_evals.extras import needed
from kvplug_evals.interrupts import Interrupts

if TYPE_CHECKING:
    from kvplug_evals.calibration.quality import Found

HEADS = ("density", "sinks", "window", "device")
QUALITY = ("policy", "budget", "answer", "at_once", "held_out", "engine", "dtype", "threads")


def calibrate(
    model: Annotated[str, typer.Argument(help="Model folder; of heads also a name.")],
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="To read; Python's documentation if none."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; heads.json, or quality.json.")
    ] = None,
    contexts: Annotated[
        int | None, typer.Option(help="Parts of the text that are read: 4, or 16 for --quality.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of each: 4096, or 2048 for --quality, as a prompt."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of it that each pattern reads: 0.125.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens that all patterns read: 128.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Last tokens that are near: 256.")] = None,
    device: Annotated[str | None, typer.Option(help="Of heads, as torch names it: cpu.")] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            help="Find the smallest budget of --policy that loses less than so many nats a token "
            "over dense, at 95 % confidence, in the engine."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="With {budget} or {share} in it, such as 'snapkv(budget={budget})'."),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the context to try; repeatable. 1/32 to 1/2 if none."),
    ] = None,
    answer: Annotated[
        int | None, typer.Option(help="Tokens behind each prompt, whose loss is taken: 64.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(help="Requests served together: 4.")] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text on which to try what was chosen."),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, or sglang.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and cache: auto, float32, bfloat16, float16.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the engine: 1.")] = None,
    to: Json = None,
) -> None:
    """Measure a model on your own text, and write a file.

    Without --quality: what each of its heads looks at, by transformers in float32, for policies
    that treat heads by kind, such as minference(heads='heads.json'). With it: the smallest budget
    of a policy line that is good enough, by the engine that serves.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    wrong = [name for name in (HEADS if quality is not None else QUALITY) if name in given]
    if wrong:
        option = wrong[0].replace("_", "-")
        what = "of heads, without" if quality is not None else "of budgets, with"
        raise ValueError(f"--{option} is {what} --quality; leave one of them out, or add it")
    target = out or Path("heads.json" if quality is None else "quality.json")
    target.parent.resolve(strict=True)  # now, and not when all is measured
    sizes = {n: given[n] for n in ("contexts", "context", *HEADS, *QUALITY) if n in given}
    source = measure.TEXT if text is None else text.name
    if quality is not None and policy is None:
        raise ValueError(
            "--quality finds the budget of a line; write --policy 'snapkv(budget={budget})'"
        )
    with screen(to) as console:
        if quality is None:
            named = {name: value for name, value in sizes.items() if name != "device"}
            setting = measure.Setting(**named)
            _heads(model, text, source, setting, device or "cpu", target, console)
        else:
            named = {n: x for n, x in sizes.items() if n not in ("held_out", "engine", "policy")}
            if "budget" in named:
                named["shares"] = tuple(named.pop("budget"))
            told = {**named, "line": policy, "quality": quality}
            _quality(model, text, source, held_out, told, engine or "vllm", target, console)
    write_json(json.loads(target.read_text()), to)


def _heads(
    model: str, text: Path | None, source: str, setting: measure.Setting, device: str, out: Path,
    console: Console,
) -> None:  # fmt: skip
    began = perf_counter()
    with progress(Console(stderr=True)) as bar:
        bar.say("layers of contexts")
        found = measure.calibrate(
            model, None if text is None else text.read_text(), setting, device=device,
            source=source, tell=bar.reach,
        )  # fmt: skip
    found.save(out)
    _show_heads(found, setting, out, perf_counter() - began, console)


def _show_heads(
    found: Heads, setting: measure.Setting, out: Path, seconds: float, console: Console
) -> None:
    group = found.shape.heads // found.shape.kv_heads
    chosen = [
        pattern
        for layer in sorted(found.layers)
        for pattern in found.patterns(layer * found.shape.kv_heads, found.shape.kv_heads, group)
    ]
    console.print(f"{found.model}: {found.shape}", soft_wrap=True)
    table = Table(box=box.SIMPLE)
    for column in ("pattern", "best for KV heads", "recall, mean", "least"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for pattern in found.layers[min(found.layers)].recall:
        each = [share for layer in found.layers.values() for share in layer.recall[pattern]]
        mean, least = sum(each) / len(each), min(each)
        table.add_row(pattern, str(chosen.count(pattern)), f"{mean:.3f}", f"{least:.3f}")
    console.print(table)
    lost = sorted(share for layer in found.layers.values() for share in layer.lost)
    far = sorted(share for layer in found.layers.values() for share in layer.outside)
    console.print(
        f"attention outside the first {setting.sinks} and the last {setting.window} tokens: "
        f"{far[0]:.1%} to {far[-1]:.1%} of a KV head's, {far[len(far) // 2]:.1%} in the middle\n"
        f"output that changes without it: {lost[0]:.1%} to {lost[-1]:.1%}, "
        f"{lost[len(lost) // 2]:.1%} in the middle\n"
        f"{out}: {len(chosen)} KV heads ({seconds:.0f} s)",
        soft_wrap=True,
    )


def _quality(
    model: str,
    text: Path | None,
    source: str,
    held_out: Path | None,
    given: dict[str, object],
    engine: str,
    out: Path,
    console: Console,
) -> None:
    with needed("--quality", "cli,evals"):
        from kvplug_evals.calibration import quality
        from kvplug_evals.demo.session import machine
        from kvplug_evals.engines.interface import EngineError

    began, interrupts = perf_counter(), Interrupts()
    setting = quality.Setting(**given)  # type: ignore[arg-type]
    whole = measure.default_text() if text is None else text.read_text()
    reading = quality.read_text(whole, source, model, setting)
    apart = None
    if held_out is not None:
        apart = quality.read_text(held_out.read_text(), held_out.name, model, setting)
    failed = Console(stderr=True, highlight=False)
    lines = 1 + len(setting.lines) + 2 * (apart is not None)
    try:
        with progress(failed, lines * setting.contexts) as bar:

            def answered() -> None:
                interrupts.check()
                bar.advance()

            found = quality.find(
                engine, model, setting, reading, apart,
                lambda what: bar.say(escape(what)), answered,
            )  # fmt: skip
    except (KeyboardInterrupt, EngineError) as error:
        if interrupts.came:
            failed.print("stopped; no engine is left running")
            raise typer.Exit(130) from None
        raise ValueError(str(error)) from None
    console.print(_tried(found), soft_wrap=True)
    chosen = found.chosen
    if chosen is None:
        raise ValueError(quality.unmet(found))
    environment = {
        "command": shlex.join(["kvplug", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": machine(found.engine, "transformers"),
    }
    found.save(out, environment)
    console.print(
        f"[bold]{escape(chosen.policy)}[/] loses {chosen.loss:+.3f} nats a token, at most "
        f"{chosen.bound:+.3f} with 95 % confidence: {out} ({perf_counter() - began:.0f} s)",
        soft_wrap=True,
    )
    if found.held_out is not None:
        there, _, measured = found.held_out
        kept = "within" if measured.loss < setting.quality else "[bold red]not within[/]"
        console.print(
            f"on {escape(there.name)}: {measured.loss:+.3f}, at most {measured.bound:+.3f}; "
            f"{kept} {setting.quality}",
            soft_wrap=True,
        )


def _tried(found: Found) -> Table:
    setting = found.setting
    table = Table(
        box=box.SIMPLE,
        title=f"{setting.contexts} prompts of {setting.context:,} tokens of "
        f"{escape(found.text.name)}, {setting.answer - 1} tokens behind each; dense "
        f"{found.dense:.3f}",
        title_justify="left",
        caption="nats a token over dense; at most: with 95 % confidence",
    )
    for column in ("policy", "read", "loss", "at most", f"below {setting.quality:g}"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for each in found.measured:
        table.add_row(
            escape(each.policy), f"{each.read:.1%}", f"{each.loss:+.4f}", f"{each.bound:+.4f}",
            "yes" if each.meets(setting.quality) else "no",
        )  # fmt: skip
    return table
