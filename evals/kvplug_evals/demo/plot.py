"""What each policy holds over time and reads per step, on one page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvplug_evals.demo.report import Result

# Okabe and Ito's colours, which every kind of colour vision tells apart; black is dense.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(result: Result, file: Path) -> None:
    """A row of axes for each policy, all on the same scales."""
    rows, dense, engine = result.rows, result.dense, result.engine
    figure = Figure(figsize=(10, 0.9 + 1.75 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(rows), 2, sharex="col", sharey="col", squeeze=False, width_ratios=(3, 2)
    )
    turns = range(len(dense.turns))
    for place, (row, (held, read)) in enumerate(zip(rows, grid, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        at, blocks = zip(*row.samples, strict=True)
        held.fill_between(at, blocks, step="post", color=colour, alpha=0.25, lw=0)
        held.step(at, blocks, where="post", color=colour, lw=1.5)
        held.axhline(dense.peak, color="0.5", lw=1, ls="--")
        held.set_title(row.policy, loc="left", fontsize=10, fontweight="bold", color=colour)
        held.set_title(f"peak {row.peak} blocks", loc="right", fontsize=10)
        held.set_ylim(0, max(each.peak for each in rows) * 1.15)

        tokens = [turn.read_per_step for turn in row.turns]
        read.barh(turns, tokens, color=colour, height=0.7)
        for turn, count in enumerate(tokens):
            share = count / dense.turns[turn].read_per_step
            label = f"{count:,.0f}" if row is dense else f"{count:,.0f}  ({share:.0%})"
            read.text(count + dense.read_per_step * 0.02, turn, label, va="center", fontsize=9)
        read.set_yticks(turns, [f"turn {turn + 1}" for turn in turns])
        read.axvline(dense.read_per_step, color="0.5", lw=1, ls="--")
        read.set_xlim(0, dense.read_per_step * 1.25)
        for axes in (held, read):
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 1].invert_yaxis()
    grid[0, 1].set_title("dashed: dense", loc="right", fontsize=9, color="0.4")
    grid[-1, 0].set_xlabel("seconds since the first question")
    grid[-1, 1].set_xlabel("tokens read by a decode step, mean over layers")
    figure.supylabel("KV blocks held", fontsize=10)
    figure.suptitle(
        f"One conversation, {len(rows)} policies: {engine.model.name}, "
        f"{engine.title} {result.machine[engine.package]}, {result.machine['cpu']}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.savefig(file, dpi=150)
