"""Rows as tables and JSON, and the claim that every policy saved something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvplug import parse
from kvplug_evals.demo.conversation import CLIENTS, DOCUMENTS, TURNS, Conversation, Sizes
from kvplug_evals.demo.measure import OUTPUT_TOKENS, Row, Turn
from kvplug_evals.served.engine import Engine


class NothingSaved(Exception):
    """A policy held and read as much as dense attention, or evicts and made no room."""


@dataclass(frozen=True, kw_only=True)
class Result:
    rows: list[Row]
    engine: Engine
    sizes: Sizes
    machine: dict[str, str]
    seconds: float

    @property
    def dense(self) -> Row:
        return next(row for row in self.rows if row.is_dense)

    def peak_mib(self, row: Row) -> float:
        """Of the engine's own allocation: a policy with digests has larger blocks."""
        return row.peak * self.engine.kv_cache_mib / (row.pool + 1)


def check_savings(rows: Sequence[Row]) -> None:
    """Raises NothingSaved unless every policy read fewer tokens or held fewer blocks, and one
    that evicts ran more documents at once wherever dense could not run all of them."""
    dense = next(row for row in rows if row.is_dense)
    idle = [
        f"{row.policy} held {row.peak} blocks and read {row.read_per_step:,.0f} tokens a step"
        for row in rows
        if not row.is_dense and row.peak >= dense.peak and row.read_per_step >= dense.read_per_step
    ]
    if idle:
        raise NothingSaved(
            f"{'; '.join(idle)}: no less than dense, which held {dense.peak} and read "
            f"{dense.read_per_step:,.0f}. Give it a budget below the conversation's length"
        )
    crowded = [
        f"{row.policy} ran {row.at_once} documents at once"
        for row in rows
        if evicts(row) and row.at_once <= dense.at_once < DOCUMENTS
    ]
    if crowded:
        raise NothingSaved(
            f"{'; '.join(crowded)}: no more than dense, which ran {dense.at_once}. Give it a "
            "budget below a document's length"
        )


def evicts(row: Row) -> bool:
    policy = parse(row.policy)
    return policy.scored is not None or policy.eviction is not None


def say_plan(console: Console, talk: Conversation, engine: Engine, servers: int) -> None:
    console.print(
        f"[bold]kvplug demo[/]: the same conversation under {servers} policies, each with its own "
        f"[bold]{engine.launcher} {escape(str(engine.model))} --attention-backend kvplug[/]. "
        f"{CLIENTS} clients share a context of {len(talk.context.split()):,} words (Python's "
        f"language reference) in which {len(talk.questions)} facts are planted, and each asks for "
        f"one fact a turn, {TURNS} turns, all at once. Then {DOCUMENTS} documents "
        f"that share nothing arrive at once, more than the pool holds whole.\n"
    )


def say_turn(console: Console, row: Row) -> None:
    turn = row.turns[-1]
    prompt = sum(reply.prompt_tokens for reply in turn.replies)
    cached = sum(reply.cached_tokens for reply in turn.replies)
    console.print(
        f"    turn {len(row.turns)}: {turn.seconds:4.1f} s, "
        f"prompts {cached / prompt:4.0%} cached, {turn.read_per_step:5,.0f} tokens read a step, "
        f"{sum(reply.right for reply in turn.replies)} of {len(turn.replies)} right"
    )


def say_documents(console: Console, row: Row) -> None:
    console.print(
        f"    documents: {row.documents_seconds:4.1f} s, {row.at_once} of {DOCUMENTS} at once"
    )


def say_result(console: Console, result: Result) -> None:
    for table in (_savings(result), _room(result), _speed(result), _answers(result)):
        console.print(table, "")
    engine, machine = result.engine, result.machine
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row(
        "active",
        f"attention backend kvplug, blocks of {engine.block_size} tokens, prefix caching, "
        f"prefill in chunks of {engine.chunk}, {engine.kv_cache_mib} MiB of KV cache, "
        f"{engine.mode}, {engine.threads} threads",
    )
    facts.add_row(
        "versions",
        f"kvplug {machine['kvplug']}, {engine.title} {machine[engine.package]}, "
        f"torch {machine['torch']}, Python {machine['python']}",
    )
    facts.add_row("hardware", f"{machine['cpu']}; {result.seconds:.0f} s in all")
    facts.add_row(
        "notes",
        "Blocks and tokens are the engine's own counts and carry over to any hardware. Times do "
        "not: in a tiny model on a CPU attention is a small part of a step, and choosing pages "
        "can cost more than reading them. Such a model also misses facts with dense attention. "
        "streaming_llm frees the middle of the context and cannot answer from it; quest keeps all "
        "of it and reads the pages that the question points at. snapkv compresses each prompt: "
        "where clients share one context, that context stays cached beside what each keeps of it, "
        "and it holds more than dense; where documents share nothing, more of them run at once.",
    )
    console.print(facts)


def _table(title: str, headers: Sequence[str], caption: str = "") -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("\npolicy", style="cyan", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _savings(result: Result) -> Table:
    engine, said = result.engine, result.dense.fits is not None
    table = _table(
        "Memory and reads",
        (
            "KV blocks\npeak",
            "\nMiB",
            "vs\ndense",
            "tokens\nread¹",
            "vs\ndense",
            *(["requests\nthat fit²"] if said else []),
        ),
        "¹ by a decode step of one request, mean over the layers"
        + f"\n² of {engine.max_model_len:,} tokens, as {engine.title} says at its start" * said,
    )
    dense = result.dense
    for row in result.rows:
        mib = result.peak_mib(row)
        table.add_row(
            short(row.policy),
            str(row.peak),
            f"{mib:.0f}",
            f"{mib / result.peak_mib(dense):.0%}",
            f"{row.read_per_step:,.0f}",
            f"{row.read_per_step / dense.read_per_step:.0%}",
            *([f"{row.fits:.1f}"] if row.fits is not None else []),
        )
    return table


def _room(result: Result) -> Table:
    engine = result.engine
    table = _table(
        "Requests at once",
        ("most\nat once", "mean\nat once¹", "all\nserved in", "vs\ndense"),
        f"{DOCUMENTS} documents of their own, {result.sizes.document_tokens} tokens behind each, "
        f"in a pool of {engine.kv_cache_mib} MiB\n¹ of the engine's batch, while they were served",
    )
    for row in result.rows:
        table.add_row(
            short(row.policy),
            str(row.at_once),
            f"{row.mean_at_once:.1f}",
            f"{row.documents_seconds:.1f} s",
            f"{row.documents_seconds / result.dense.documents_seconds:.0%}",
        )
    return table


def _speed(result: Result) -> Table:
    prompt = mean(reply.prompt_tokens for reply in result.dense.replies)
    table = _table(
        "Time and answers",
        (
            "TTFT¹\nturn 1",
            "TTFT\nlater",
            "per\ntoken",
            f"cached tokens²\nturn 1 to {TURNS}",
            "answers\nright",
        ),
        "¹ time to first token; times are medians over requests\n"
        f"² of a request's {prompt:,.0f} prompt tokens, mean",
    )
    for row in result.rows:
        cached = [mean(reply.cached_tokens for reply in turn.replies) for turn in row.turns]
        table.add_row(
            short(row.policy),
            f"{first_token(row.turns[:1]):.1f} s",
            f"{first_token(row.turns[1:]):.2f} s",
            f"{median(reply.token_seconds for reply in row.replies) * 1e3:.0f} ms",
            " ".join(f"{tokens:,.0f}" for tokens in cached),
            f"{row.right} of {len(row.replies)}",
        )
    return table


def first_token(turns: Sequence[Turn]) -> float:
    return median(reply.first_token_seconds for turn in turns for reply in turn.replies)


def _answers(result: Result) -> Table:
    table = Table(
        title="Answers",
        title_justify="left",
        title_style="bold",
        caption="¹ its place in the context",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("fact", no_wrap=True)
    table.add_column("at¹", justify="right", no_wrap=True)
    table.add_column("is", no_wrap=True)
    for row in result.rows:
        table.add_column(short(row.policy), header_style="cyan", overflow="fold")
    by_depth = sorted(
        zip(*(row.replies for row in result.rows), strict=True),
        key=lambda replies: replies[0].question.depth,
    )
    for replies in by_depth:
        question = replies[0].question
        answers = (
            f"[{'green' if reply.right else 'red'}]{'✓' if reply.right else '✗'} "
            f"{escape(_one_line(reply.answer))}[/]"
            for reply in replies
        )
        table.add_row(question.key, f"{question.depth:.0%}", question.answer, *answers)
    return table


def _one_line(text: str, width: int = 16) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def short(policy: str) -> str:
    """A policy for a narrow column: on two lines if it is long."""
    name, bracket, options = policy.partition("(")
    return policy if len(policy) <= 20 else f"{name}\n{bracket}{options.replace(' + ', chr(10))}"


def as_data(result: Result) -> dict[str, Any]:
    rows = [
        {
            **asdict(row),
            "blocks_held_peak": row.peak,
            "blocks_held_mean": row.mean_held,
            "documents_at_once": row.at_once,
            "documents_at_once_mean": row.mean_at_once,
            "mib_held_peak": result.peak_mib(row),
            "tokens_read_per_step": row.read_per_step,
            "answers_right": row.right,
        }
        for row in result.rows
    ]
    return {
        "machine": result.machine,
        "settings": {
            **result.engine.as_json(),
            "sizes": asdict(result.sizes),
            "output_tokens": OUTPUT_TOKENS,
        },
        "seconds": result.seconds,
        "policies": rows,
    }
