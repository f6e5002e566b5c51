"""``kvplug plan``: whether kvplug helps a model, a card and traffic, and with which line."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvplug.advice.bounds import Setup, Traffic, pool_bytes, read_traffic
from kvplug.advice.card import CARDS, Card, amount, choose_card
from kvplug.advice.model import Model, read_model
from kvplug.advice.pace import Pace, read_pace
from kvplug.advice.published import CLASSES, ENGINE_FP8
from kvplug.advice.ranking import WORTH, Advice, Line, advise, commands
from kvplug.registry import did_you_mean
from kvplug.shown import STDOUT, Json, write_json

GiB = 1 << 30


def plan(
    model: Annotated[str, typer.Argument(help="Model folder, or its config.json.")],
    traffic: Annotated[
        str, typer.Option(help="Prompt tokens / answer tokens @ requests at once.")
    ] = "32000/500@16",
    gpu: Annotated[str | None, typer.Option(help=f"One of {', '.join(CARDS)}.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of a card, such as 80GiB.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Of its memory, such as 3.35TB/s.")] = None,
    arithmetic: Annotated[
        str | None, typer.Option(help="Dense, in 16 bits, such as 989TFLOPS.")
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="What a line may lose in published measurements: close (0.1 nats a token on its "
            "worst text, all look-ups), near (0.25, nine of ten) or any."
        ),
    ] = "close",
    policy: Annotated[
        list[str] | None, typer.Option(help="A line beside the usual ones; may be repeated.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Bytes of the cache on each card, instead of what its memory leaves."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Bytes of the weights, if known.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Of tensor parallelism.")] = 1,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 32,
    chunk: Annotated[
        int, typer.Option(min=1, help="--max-num-batched-tokens of the server.")
    ] = 8192,
    pace: Annotated[
        Path | None,
        typer.Option(
            help="A file of kvplug bench decode, instead of a card: steps as they took on that "
            "machine."
        ),
    ] = None,
    to: Json = None,
) -> None:
    """Say whether kvplug helps, by arithmetic: no engine is started, nothing is fetched.

    Bytes and blocks are counted as the engine's, times are bounds that no kernel beats
    (kvplug.advice.bounds has the formulas), or what --pace measured; quality is what the project
    published.
    """
    if quality not in CLASSES:
        raise ValueError(f"unknown quality {quality!r}.{did_you_mean(quality, list(CLASSES))}")
    comes = read_traffic(traffic)
    shape = read_model(model, ranks, int(amount(weights, "weights", "16GiB")) if weights else None)
    if pace is None:
        measured, card = None, choose_card(gpu, memory, bandwidth, arithmetic)
    else:
        measured = read_pace(pace)
        measured.check(shape, block_size)
        shape = replace(shape, itemsize=measured.itemsize)
        card = _measured_card(measured, memory, cache, gpu or bandwidth or arithmetic)
    pool = amount(cache, "cache", "40GiB") if cache else pool_bytes(shape, card)
    setup = Setup(card=card, pool=pool, block_size=block_size, chunk=chunk, pace=measured)
    found = advise(shape, setup, comes, quality, policy or ())
    write_json(as_data(shape, setup, comes, quality, found, ranks), to)
    if to != STDOUT:
        show(Console(width=max(Console().width, 118), highlight=False), shape, setup, comes,
             quality, found, ranks)  # fmt: skip


def _measured_card(pace: Pace, memory: str | None, cache: str | None, said: str | None) -> Card:
    """said: of a machine's speed, beside the pace. Raises ValueError."""
    if said:
        raise ValueError(
            "--pace says how fast a machine is, and so do --gpu, --bandwidth and --arithmetic; "
            "leave one of them out"
        )
    if not (memory or cache):
        raise ValueError("--pace knows no memory; write --cache 4GiB, or --memory 16GiB")
    return Card(
        name=pace.source, memory=amount(memory, "memory", "80GiB") if memory else 0,
        bandwidth=1 / pace.whole, arithmetic=pace.arithmetic,
    )  # fmt: skip


def as_data(
    model: Model, setup: Setup, traffic: Traffic, quality: str, advice: Advice, ranks: int
) -> dict[str, Any]:
    """All figures, in bytes, seconds, tokens and requests."""
    lines = [advice.dense, *advice.lines]
    return {
        "model": {
            "name": model.name, "weights_bytes": model.weights, "estimated": model.estimated,
            "kv_bytes_per_token": model.cache_token(), "refused": model.refused,
            "layers": {
                "full": len(model.planned),
                "windowed": sum(x.window is not None for x in model.attention),
                "recurrent": sum(x.state > 0 for x in model.layers),
                "sharing": sum(not x.owns for x in model.attention),
            },
        },
        "card": asdict(setup.card), "pace": asdict(setup.pace) if setup.pace else None,
        "cache_bytes": setup.pool, "block_size": setup.block_size,
        "ranks": ranks, "traffic": asdict(traffic), "quality": quality,
        "lines": [_line_data(line) for line in lines],
        "left_out": [{"policy": line, "reason": why} for line, why in advice.left_out],
        "best": advice.best.policy if advice.best else None,
        "commands": commands(model.name, advice.best.policy, setup, traffic, ranks)
        if advice.best else [],
        "notes": advice.notes,
    }  # fmt: skip


def _line_data(line: Line) -> dict[str, Any]:
    held, answers = line.bounds.capacity, line.quality
    return {
        "policy": line.policy,
        "requests_of_the_start_up_line": round(held.requests, 4),
        "requests_at_once": held.together,
        "served_at_once": line.bounds.at_once,
        "blocks": held.blocks,
        "blocks_per_request": held.most,
        "blocks_behind_the_prompt": held.settled,
        "exact": held.exact,
        "read_bytes_per_step": line.bounds.read,
        "step_seconds": line.bounds.step,
        "first_token_seconds": line.bounds.first,
        "tokens_per_second": line.bounds.rate,
        "gain": line.gain if line.gain != float("inf") else None,
        "qualifies": line.qualifies,
        "crowded": line.crowded,
        "worst_loss": asdict(answers.loss) if answers.loss else None,
        "look_ups": asdict(answers.found) if answers.found else None,
        "sources": list(answers.sources),
    }


def show(
    console: Console, model: Model, setup: Setup, traffic: Traffic, quality: str, advice: Advice,
    ranks: int,
) -> None:  # fmt: skip
    card, planned = setup.card, len(model.planned)
    console.print(
        f"[bold]{escape(model.name)}[/]: {model.weights / GiB:.1f} GiB of weights, "
        f"{model.cache_token():,} bytes of cache a token in {planned} layers that see all"
        + (f", {len(model.attention) - planned} with a window" * (len(model.attention) > planned))
        + (f"; {len(model.layers) - len(model.attention)} recurrent"
           * (len(model.layers) > len(model.attention)))
        + (f"; each of {ranks} ranks" if ranks > 1 else "")
    )  # fmt: skip
    console.print(
        f"{card.name}: {setup.pool / GiB:.1f} GiB for the cache, {card.bandwidth / 1e12:.2g} "
        f"TB/s; {traffic.at_once} requests of {traffic.prompt:,} tokens and answers of "
        f"{traffic.answer:,}"
    )
    if model.refused:
        console.print(f"[bold]do not use kvplug here[/]: {model.refused}")
        return
    console.print(_table(advice, quality, setup.pace))
    for policy, reason in advice.left_out:
        console.print(f"left out: {escape(policy)}: {escape(reason)}")
    best = advice.best
    if best is None:
        console.print(
            f"[bold]do not use kvplug here[/]: of the lines whose published quality is "
            f"'{quality}', none gains {WORTH - 1:.0%} over dense"
        )
    else:
        most = "" if setup.pace else " at most"
        console.print(f"[bold]{escape(best.policy)}[/] gains {_gain(best)}{most}:")
        for command in commands(model.name, best.policy, setup, traffic, ranks):
            console.print(f"\n  {escape(command)}", soft_wrap=True)
        console.print()
    for note in advice.notes:
        console.print(f"- {escape(note)}", soft_wrap=True)


def _table(advice: Advice, quality: str, pace: Pace | None) -> Table:
    times = "step, TTFT and tokens/s are bounds"
    if pace is not None:
        times = f"steps as measured ones took ({pace.source}), TTFT by its arithmetic"
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption=f"{times}. Above the rule: published quality "
        f"'{quality}'. Loss: nats a token over dense, on the worst published text; look-ups: of "
        "exact recall.",
    )
    table.add_column("line", overflow="fold", min_width=30)
    for name in ("fit", "decode\ntogether", "read a\nstep", "step\nms", "TTFT\ns", "tokens\n/s",
                 "gain", "loss", "look-\nups"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for before, line in pairwise([advice.dense, advice.dense, *advice.lines]):
        if before.qualifies and not line.qualifies:
            table.add_section()
        table.add_row(*_cells(line, advice.dense), style=None if line.qualifies else "dim")
    return table


def _cells(line: Line, dense: Line) -> list[str]:
    found, answers = line.bounds, line.quality
    loss = "" if line is dense else "?"
    if answers.loss is not None and answers.loss.loss is not None:
        loss = f"{answers.loss.loss:+.2f}"
    looked = "" if answers.found is None else f"{answers.found.found:.0%}"
    read = f"{found.read / dense.bounds.read:.0%}"
    name = "vLLM's fp8 cache" if line.policy == ENGINE_FP8 else line.policy
    return [
        escape(name),
        f"{found.capacity.requests:.2f}",
        str(found.at_once),
        f"{found.read / GiB:.2f} GiB" if line is dense else read,
        f"{1e3 * found.step:.1f}",
        f"{found.first:.2f}",
        f"{found.rate:,.0f}",
        _gain(line) if line is not dense else "",
        loss,
        looked,
    ]  # fmt: skip


def _gain(line: Line) -> str:
    return "dense fits none" if line.gain == float("inf") else f"x {line.gain:.2f}"
