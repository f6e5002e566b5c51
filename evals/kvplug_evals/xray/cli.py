"""``kvplug xray``: what each head keeps and reads of a text, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvplug.shown import STDOUT, Json, progress, write_json
from kvplug_evals.extras import needed


def xray(
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The prompt's file.")],
    policy: Annotated[str, typer.Option(help="A policy line.")] = "twilight(budget=0.0625)",
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path(".models/smollm2"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("xray.html"),
    steps: Annotated[int, typer.Option(min=1, help="Tokens of the answer to look at.")] = 8,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 32,
    longest: Annotated[int, typer.Option(min=1, help="Tokens that the text is cut to.")] = 4000,
    to: Json = None,
) -> None:
    """Show a text by what each layer and KV head keeps and reads of it as an answer is decoded.

    Computed by transformers in float32 on the CPU, with the policy's own choices; the page needs
    no network.
    """
    with needed("kvplug xray", "cli,evals"):
        from kvplug_evals.xray.looks import take
        from kvplug_evals.xray.page import render

    with progress(Console(stderr=True)) as bar:
        # The prompt is most of the work, and what is left is known once it was read twice.
        bar.say("computing the prompt, dense and as kept")
        looks = take(model, text.read_text(), policy, steps, block_size, longest, bar.reach)
    page = render(looks, line=policy, model=model.name, layers=looks.layers)
    out.write_text(page)
    read = (looks.seen & 32 > 0).sum() / (looks.seen.shape[0] * looks.seen.shape[1])
    same = sum(a == b for a, b in zip(looks.answer, looks.said, strict=True))
    figures = {
        "page": str(out), "bytes": len(page), "tokens": looks.prompt, "steps": len(looks.answer),
        "read_per_step": float(read / looks.seen.shape[2]), "lost": float(looks.lost.mean()),
        "as_dense": same,
    }  # fmt: skip
    write_json(figures, to)
    if to != STDOUT:
        print(
            f"{out}: {len(page) / 1e6:.1f} MB, {looks.prompt:,} tokens and {len(looks.answer)} "
            f"steps; {figures['read_per_step']:,.0f} tokens read in the mean, "
            f"{looks.lost.mean():.1%} of dense attention lost, {same} of {len(looks.answer)} "
            "tokens as dense"
        )
