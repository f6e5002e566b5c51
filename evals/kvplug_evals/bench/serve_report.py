"""A run of ``kvplug bench serve`` as JSON, as text and as a plot."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from kvplug_evals.bench.provenance import heading, save_with_table, table
from kvplug_evals.bench.serve import BATCH, MEMORY, TURNS, Cell, Run, shown

HOLDS, LOSES, FEWER = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito's


def save(run: Run) -> None:
    """JSON, and beside it the table and the plot."""
    out = run.options.out
    save_with_table(out, run.as_json(), partial(show, run))
    draw(run, out.with_suffix(".png"))


def show(run: Run, console: Console) -> None:
    options, engine = run.options, run.engine
    console.print(
        heading(run.provenance, engine)
        + f"{engine.model.name}, {engine.dtype}, prompts of {options.tokens:,} tokens, answers of "
        f"{options.output}, blocks of {engine.block_size}, prefill in chunks of {engine.chunk}, "
        f"{engine.kv_cache_mib:,} MiB of KV cache, which hold {options.fit:g} dense requests\n",
        soft_wrap=True,
    )
    for load, title in titles(run).items():
        console.print(_table(run, load, title))
    losing, compared = sum(loses(c, run) for c in run.cells), len(run.cells) - len(titles(run))
    console.print(
        f"{losing} of {compared} cells give fewer tokens a second than dense. "
        f"Medians of {options.repeats}; spread: greatest less smallest. read: bytes that a decode "
        "step reads, digests included, of those that dense reads; = dense: all, the policy "
        "left these requests to dense attention. as dense: share of an answer's words before the "
        "first that dense's has not, mean. peak: blocks that were held, as far as a look every "
        "tenth of a second shows. cached: share of later turns' prompts, whose TTFT is that of "
        "turns after the first. All requests of a load are sent at once, by the engine's own load "
        "generator, or as turns over one context.",
        soft_wrap=True,
    )


def titles(run: Run) -> dict[str, str]:
    """Of the loads that were sent, in order."""
    options = run.options
    titles = {
        BATCH: f"{options.batch} requests that fit, prompts cached: what selection gives",
        MEMORY: f"{options.requests} new prompts, {options.fit:g} fit: what eviction gives",
        TURNS: f"{options.batch} clients, {options.turns} turns over one context",
    }
    return {load: title for load, title in titles.items() if run.of(load)}


def loses(cell: Cell, run: Run) -> bool:
    speed = "output_tokens_per_second"
    return cell.of(speed) < run.dense(cell.load).of(speed)


def _table(run: Run, load: str, title: str) -> Table:
    made = table(
        title,
        ["policy", "tokens/s", "spread", "of dense", "TTFT ms", "TPOT ms", "preempted", "peak",
         "cached", "read", "as dense"],
    )  # fmt: skip
    made.columns[0].no_wrap = False  # a long policy folds, so that no number is cut short
    dense = run.dense(load)
    speed = "output_tokens_per_second"
    for cell in run.of(load):
        low, high = cell.range(speed)
        made.add_row(
            cell.policy.replace(" + ", "\n+ "),
            f"{cell.of(speed):.1f}",
            f"{(high - low) / cell.of(speed):.0%}",
            f"[bold]{cell.of(speed) / dense.of(speed):.2f}[/]",
            f"{cell.of('ttft_ms'):,.0f}",
            f"{cell.of('tpot_ms'):,.1f}",
            str(sum(cell.preempted)),
            shown(cell.peak),
            f"{median(cell.cached):.0%}" if cell.cached else "",
            "= dense" if cell.does_nothing else f"{cell.read:.0%}",
            f"{cell.as_dense(dense):.0%}",
            style="red" if loses(cell, run) else None,
        )
    return made


def draw(run: Run, file: Path) -> None:
    """Throughput over dense's, a panel a load; what was answered stands at each bar."""
    engine, speed = run.engine, "output_tokens_per_second"
    figure = Figure(figsize=(11, 1.4 + 0.5 * len(run.of(BATCH))), layout="constrained")
    FigureCanvasAgg(figure)
    loads = titles(run)
    (panels,) = figure.subplots(1, len(loads), sharey=True, squeeze=False)
    for axes, (load, title) in zip(panels, loads.items(), strict=True):
        cells, dense = run.of(load), run.dense(load)
        ratios = [cell.of(speed) / dense.of(speed) for cell in cells]
        colours = [
            FEWER if cell is dense else LOSES if loses(cell, run) else HOLDS for cell in cells
        ]
        axes.barh([cell.policy for cell in cells], ratios, color=colours, height=0.7)
        for place, (cell, ratio) in enumerate(zip(cells, ratios, strict=True)):
            label = f"{ratio:.2f}, {cell.as_dense(dense):.0%} as dense"
            axes.text(ratio, place, f" {label}", va="center", fontsize=8)
        axes.axvline(1, color="0.5", lw=1, ls="--")
        axes.set_xlim(0, max(ratios) * 1.5)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("output tokens a second, of dense's")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"{engine.model.name}, prompts of {run.options.tokens:,} tokens, {engine.title} "
        f"{run.provenance[engine.package]}, {run.provenance['cpu']}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(file, dpi=150)
