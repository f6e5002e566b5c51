"""Rows as tables, a plot and JSON, and the claim that every policy saved something."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvplug_evals.demo.conversation import CLIENTS, TURNS, Conversation
from kvplug_evals.demo.measure import OUTPUT_TOKENS, Row
from kvplug_evals.demo.server import ServerOptions

# Okabe and Ito's colours, told apart by every kind of colour vision; black is for dense.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")


class NothingSaved(Exception):
    """A policy held and read as much as dense attention."""


@dataclass(frozen=True, kw_only=True)
class Result:
    rows: list[Row]
    options: ServerOptions
    machine: dict[str, str]
    seconds: float

    @property
    def dense(self) -> Row:
        return next(row for row in self.rows if row.is_dense)


def check_savings(rows: Sequence[Row]) -> None:
    """Raises NothingSaved unless every policy read fewer tokens or held fewer blocks."""
    dense = next(row for row in rows if row.is_dense)
    idle = [
        f"{row.policy} held {row.peak} blocks and read {row.read_per_step:,.0f} tokens a step, "
        f"dense held {dense.peak} and read {dense.read_per_step:,.0f}"
        for row in rows
        if not row.is_dense and row.peak >= dense.peak and row.read_per_step >= dense.read_per_step
    ]
    if idle:
        raise NothingSaved(
            "saved nothing: " + "; ".join(idle) + ". Give it a budget below the conversation's "
            f"{dense.read_per_step:,.0f} tokens"
        )


def say_plan(console: Console, talk: Conversation, options: ServerOptions, servers: int) -> None:
    console.print(
        f"[bold]kvplug demo[/]: {servers} times [bold]vllm serve[/] on {options.model}, one policy "
        f"each, the same conversation:\n{CLIENTS} clients share a context of "
        f"{len(talk.context.split()):,} words (Python's language reference) with "
        f"{len(talk.questions)} planted facts,\nand ask it for one each turn, {TURNS} turns, all "
        "at once. Prefix caching and chunked prefill are on.\n"
    )


def say_turn(console: Console, row: Row) -> None:
    turn = row.turns[-1]
    right = sum(reply.right for reply in turn.replies)
    cached = sum(reply.cached_tokens for reply in turn.replies)
    prompt = sum(reply.prompt_tokens for reply in turn.replies)
    console.print(
        f"    turn {len(row.turns)} of {TURNS}: {turn.seconds:4.1f} s, "
        f"{cached / prompt:.0%} of {prompt:,} prompt tokens from the prefix cache, "
        f"{turn.read_per_step:,.0f} tokens read per step, {right} of {len(turn.replies)} right"
    )


def say_result(console: Console, result: Result) -> None:
    console.print()
    console.print(_savings(result))
    console.print(_speed(result))
    console.print(_answers(result))
    options, machine = result.options, result.machine
    console.print(
        f"active   attention backend kvplug over vLLM's CPU_ATTN, bfloat16, block size "
        f"{options.block_size}, prefix caching,\n"
        f"         prefill in chunks of {options.chunk}, {options.kv_cache_mib} MiB of KV cache for "
        f"every policy, {'eager' if options.enforce_eager else 'compiled'}\n"
        f"versions kvplug {machine['kvplug']}, vLLM {machine['vllm']}, torch {machine['torch']}, "
        f"Python {machine['python']}\n"
        f"hardware {machine['cpu']}; {result.seconds:.0f} s in all"
    )
    console.print(
        "\n[bold]How to read it.[/] Blocks and tokens are what the engine counted, and carry over. "
        "Times do not:\nthis is a CPU and a model of 135M parameters, whose attention costs little "
        "beside the rest of a step.\nThe model is small and misses facts with dense attention too; "
        "what a policy costs in answers is\nfor kvplug's evaluations and your own model to say. "
        "streaming_llm drops the middle of the context\nand cannot know what stood there; quest "
        "holds all of it and reads where the question points.",
        style="dim",
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"


def _savings(result: Result) -> Table:
    table = Table(title="memory and reads", title_justify="left", title_style="bold")
    table.add_column("policy", style="cyan", overflow="fold")
    for name in ("KV blocks\nheld, peak", "vs\ndense", "requests\nthat fit¹"):
        table.add_column(name, justify="right")
    for name in ("tokens read\nper step²", "vs\ndense"):
        table.add_column(name, justify="right")
    dense = result.dense
    for row in result.rows:
        table.add_row(
            escape(row.policy),
            str(row.peak),
            _share(row.peak, dense.peak),
            f"{row.fits:.1f}",
            f"{row.read_per_step:,.0f}",
            _share(row.read_per_step, dense.read_per_step),
        )
    table.caption = (
        f"¹ of {result.options.max_model_len:,} tokens at once, as vLLM says at its start   "
        "² mean of a request's decode step over the layers"
    )
    table.caption_justify = "left"
    return table


def _speed(result: Result) -> Table:
    table = Table(title="\ntime and answers", title_justify="left", title_style="bold")
    table.add_column("policy", style="cyan", overflow="fold")
    for name in (
        "first token\nturn 1",
        "first token\nlater",
        "per output\ntoken",
        "cached tokens\nper turn³",
        "answers\nright",
    ):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(
            escape(row.policy),
            f"{median(first_tokens(row, 0)):.1f} s",
            f"{median(first_tokens(row, 1)):.2f} s",
            f"{median(reply.token_seconds for reply in row.replies) * 1e3:.0f} ms",
            " ".join(f"{mean(r.cached_tokens for r in t.replies):,.0f}" for t in row.turns),
            f"{row.right} of {len(row.replies)}",
        )
    prompt = mean(reply.prompt_tokens for reply in result.dense.replies)
    table.caption = (
        f"times are medians over requests   ³ mean of a request, of about {prompt:,.0f} tokens"
    )
    table.caption_justify = "left"
    return table


def first_tokens(row: Row, turn: int) -> list[float]:
    """Seconds to the first token: of turn 0, or of all turns from 1 on."""
    turns = row.turns[:1] if turn == 0 else row.turns[turn:]
    return [reply.first_token_seconds for t in turns for reply in t.replies]


def _answers(result: Result) -> Table:
    table = Table(title="\nanswers", title_justify="left", title_style="bold")
    table.add_column("fact, at")
    table.add_column("is")
    for row in result.rows:
        table.add_column(escape(row.policy), overflow="fold")
    by_depth = sorted(
        zip(*(row.replies for row in result.rows), strict=True),
        key=lambda replies: replies[0].question.depth,
    )
    for replies in by_depth:
        question = replies[0].question
        table.add_row(
            f"{question.key}, {question.depth:.0%}",
            question.answer,
            *(
                f"[{'green' if reply.right else 'red'}]{'✓' if reply.right else '✗'} "
                f"{escape(_short(reply.answer))}[/]"
                for reply in replies
            ),
        )
    return table


def _short(answer: str, width: int = 18) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def as_json(result: Result) -> str:
    rows = [
        {
            **asdict(row),
            "blocks_held_peak": row.peak,
            "blocks_held_mean": row.mean_held,
            "tokens_read_per_step": row.read_per_step,
            "answers_right": row.right,
        }
        for row in result.rows
    ]
    settings = {**result.options.as_json(), "output_tokens": OUTPUT_TOKENS}
    whole = {
        "machine": result.machine,
        "settings": settings,
        "seconds": result.seconds,
        "policies": rows,
    }
    return json.dumps(whole, indent=1) + "\n"


def draw(result: Result, file: Path) -> None:
    """Blocks held over time, and tokens read per step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    held, read = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = [
        (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i in range(len(result.rows))
    ]
    for row, (colour, dash) in zip(result.rows, styles, strict=True):
        at, blocks = zip(*row.samples, strict=True)
        held.step(at, blocks, where="post", color=colour, linestyle=dash, lw=2, label=row.policy)
    held.set(xlabel="seconds since the first question", ylabel="KV blocks held")
    held.set_ylim(bottom=0)
    held.set_title(f"Memory: {CLIENTS} clients, one shared context, {TURNS} turns", loc="left")
    held.legend(frameon=False)

    dense = result.dense.read_per_step
    for place, (row, (colour, _)) in enumerate(zip(result.rows, styles, strict=True)):
        read.barh(place, row.read_per_step, color=colour, height=0.6)
        text = f"{row.read_per_step:,.0f}  ({row.read_per_step / dense:.0%})"
        read.text(row.read_per_step + dense * 0.02, place, text, va="center")
    read.set_yticks(range(len(result.rows)), [wrapped(row.policy) for row in result.rows])
    read.invert_yaxis()
    read.set(xlabel="cached tokens read per decode step, mean over layers", xlim=(0, dense * 1.35))
    read.set_title("Reads", loc="left")
    for axes in (held, read):
        axes.spines[["top", "right"]].set_visible(False)
    held.grid(axis="y", alpha=0.3)
    model, machine = result.options.model.name, result.machine
    figure.text(
        0.005, -0.02, f"{model}, vLLM {machine['vllm']}, {machine['cpu']}", fontsize=8, va="top"
    )
    figure.savefig(file, dpi=150, bbox_inches="tight")


def wrapped(policy: str) -> str:
    """A policy on lines short enough for an axis."""
    return policy.replace("(", "(\n  ").replace(", ", ",\n  ").replace(" + ", "\n+ ")
