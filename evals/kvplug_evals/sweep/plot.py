"""One page for a task and context length: accuracy against bytes held, against tokens read and by
turn, and the true answers' loss against tokens read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvplug_evals.engines.stock import is_stock
from kvplug_evals.sweep.report import Line, differing, tables, told
from kvplug_evals.sweep.results import Result

# Okabe and Ito's colours, which every kind of colour vision tells apart; black is dense.
COLOURS = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F"),
    *("#4B3B8F", "#A6A61D", "#882255", "#F0E442"),
)
MARKS = "osD^vPX*<>hp"
STYLE = {"ms": 5, "lw": 1.2, "alpha": 0.85}
COLUMNS = (
    "KV bytes held while decoding, % of dense",
    "tokens read by a decode step, % of dense",
    "turn (each policy at its largest budget)",
    "tokens read by a decode step, % of dense",
)


def family(policy: str) -> str:
    """snapkv(budget=1024) + quest(budget=512) -> snapkv + quest; an engine's option by its name,
    a selection of as many as carry a share (``top_p``) apart from one of a fixed number
    """
    if is_stock(policy):
        return re.sub(r"sliding_window=\d+", "sliding_window", policy)
    if policy.startswith("pyramid("):
        return "pyramid"
    return " + ".join(
        part.partition("(")[0].strip() + " top_p" * ("top_p=" in part)
        for part in policy.split(" + ")
    )


def draw(found: Sequence[Result], out: Path) -> list[Path]:
    """A file for each suite, context length and task; those without a policy are left out."""
    several, apart = len({r.engine for r in found}) > 1, differing(found)
    pages: dict[tuple[Any, ...], list[tuple[str, list[Line]]]] = {}
    for task, made in tables(found):
        if len(made) > 1:
            suite, tokens, mode, question = made[0].result.place
            title = f"{mode}, {question}" + f", {made[0].result.engine}" * several
            title += told(made[0].result, apart)
            pages.setdefault((suite, tokens, task), []).append((title, made))
    kinds = sorted({family(r.policy) for r in found if r.policy != "dense"})
    styles = {
        kind: {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], **STYLE}
        for i, kind in enumerate(kinds)
    }  # a policy looks the same on every page
    files = []
    for (suite, tokens, task), panels in pages.items():
        file = out / f"{suite}-{task}-{tokens}.png"
        prompts = [line.means.get("prompt_tokens", tokens) for _, made in panels for line in made]
        title = f"{suite}: {task} ({panels[0][1][0].source}), "
        title += f"prompts of {sum(prompts) / len(prompts):,.0f} tokens on average"
        _page(title, panels, styles, file)
        files.append(file)
    return files


def _page(
    title: str,
    panels: Sequence[tuple[str, list[Line]]],
    styles: dict[str, dict[str, Any]],
    file: Path,
) -> None:
    here = {family(line.result.policy) for _, made in panels for line in made if not line.is_dense}
    kinds = [kind for kind in styles if kind in here]
    figure = Figure(figsize=(15, 1.4 + 3.0 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), len(COLUMNS), squeeze=False)
    for (name, made), row in zip(panels, grid, strict=True):
        dense = next(line for line in made if line.is_dense)
        _frame(row, dense, made)
        row[0].set_ylabel(f"{name}\naccuracy (share of answers)", fontsize=9)
        row[3].set_ylabel("loss of the true answer (nats)", fontsize=9)
        for kind in kinds:
            some = [line for line in made if family(line.result.policy) == kind]
            _curve(row[0], kind, styles, some, "held", "fixed")
            _curve(row[1], kind, styles, some, "read", "fixed")
            _curve(row[3], kind, styles, some, "read", "loss")
            best = max(some, key=lambda line: line.read or 0) if some else None
            if best is not None and len(best.means["turns"]) > 1:
                values = [turn["fixed"] for turn in best.means["turns"]]
                row[2].plot(range(1, len(values) + 1), values, label=kind, **styles[kind])
    for axes, label in zip(grid[-1], COLUMNS, strict=True):
        axes.set_xlabel(label, fontsize=9)
    drawn = [axes.get_legend_handles_labels() for axes in grid[:, 1]]
    told = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    figure.legend(
        [told[label] for label in ("dense", *kinds) if label in told],
        [label for label in ("dense", *kinds) if label in told],
        loc="outside lower center",
        ncols=6,
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(file, dpi=110)


def _frame(row: Sequence[Any], dense: Line, made: Sequence[Line]) -> None:
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in row[:3]:
        axes.axhline(dense.means["fixed"], color="black", lw=1, ls="--", label="dense")
        axes.set_ylim(-0.04, 1.06)
    for axes, share in ((row[0], "held"), (row[1], "read"), (row[3], "read")):
        axes.set_xlim(0, max(110, *(105 * (getattr(line, share) or 0) for line in made)))
    row[2].set_xticks(range(1, len(dense.means["turns"]) + 1))
    row[2].set_visible(len(dense.means["turns"]) > 1)
    row[3].set_visible("loss" in dense.means)
    if "loss" in dense.means:
        row[3].axhline(dense.means["loss"], color="black", lw=1, ls="--")


def _curve(
    axes: Any, kind: str, styles: dict[str, Any], some: Sequence[Line], share: str, measure: str
) -> None:
    points = sorted(
        (100 * getattr(line, share), line.means[measure])
        for line in some
        if getattr(line, share) is not None and measure in line.means
    )
    if points:
        axes.plot(*zip(*points, strict=True), label=kind, **styles[kind])
