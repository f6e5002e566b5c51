"""A sweep from start to end: an engine for each policy, a directory for each setting."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvplug.shown import Bar, progress
from kvplug_evals.demo.session import machine
from kvplug_evals.engines.interface import Engine, EngineError, EngineOptions, MiB
from kvplug_evals.engines.start import start_engine
from kvplug_evals.engines.stock import is_stock
from kvplug_evals.lm import LOSS, MODELS
from kvplug_evals.models.folder import served_dtype, token_bytes
from kvplug_evals.scbench.tasks import SOURCES
from kvplug_evals.sweep.data import SEED, load
from kvplug_evals.sweep.journal import Journal
from kvplug_evals.sweep.results import REFUSED, config_before, finished, write_whole
from kvplug_evals.sweep.settings import Setting, ours
from kvplug_evals.sweep.stats import summary


@dataclass(frozen=True, kw_only=True)
class Run:
    """What of a sweep does not change its numbers."""

    out: Path
    command: str
    threads: int = 1
    multiprocess: bool = True
    enforce_eager: bool = True
    check: Callable[[], object] = lambda: None
    """Called between answers; may raise to stop."""


def run_sweep(settings: Sequence[Setting], run: Run, console: Console) -> None:
    """Raises EngineError, ValueError and OSError; what was answered so far is kept."""
    run.out.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        _check_data(setting, run.out)
    done = finished(run.out)
    waiting = [setting for setting in settings if setting.name not in done]
    count = len(settings) - len(waiting)
    if count:
        console.print(f"{count} of {len(settings)} settings are finished already")
    with _silent("lm_eval"), progress(console, sum(map(questions, waiting))) as bar:
        for setting in waiting:
            _make_data(setting, run, bar)
        for _, group in groupby(waiting, key=lambda s: (s.engine_policy, s.tokens)):
            _serve(list(group), run, console, bar)


def _make_data(setting: Setting, run: Run, bar: Bar) -> None:
    """All of it before the first engine: what is wrong with it, or the model, is said at once."""
    options_of(setting, run)
    for name, options in setting.suite.tasks.items():
        run.check()
        bar.say(f"making the data of {escape(name)}")
        load(name, setting, options)


def _serve(settings: Sequence[Setting], run: Run, console: Console, bar: Bar) -> None:
    policy, started = settings[0].engine_policy, time.monotonic()
    bar.say(f"starting {settings[0].engine}: {escape(policy)}")
    try:
        engine = start_engine(settings[0].engine, policy, options_of(settings[0], run))
    except EngineError as error:
        if not is_stock(policy):
            raise
        _refuse(settings, run, str(error))
        console.print(f"[yellow]{escape(policy)}[/] is left out: {escape(str(error))}")
        return
    ready = time.monotonic() - started
    console.print(f"[cyan]{escape(policy)}[/], {settings[0].tokens:,} tokens: up in {ready:.0f} s")
    try:
        for setting in settings:
            # Single requests find their context encoded before they are timed, by whom is all
            # one: only the first turn of a conversation must not be found in the cache.
            if setting.mode == "multi-turn":
                engine.forget()
            began = time.monotonic()
            rows = _run_setting(setting, run, engine, bar)
            scores = [row["fixed"] for row in rows]
            console.print(
                f"    {setting.mode}, {setting.question}: {sum(scores) / len(scores):.2f} of "
                f"{len(scores)} answers in {time.monotonic() - began:.0f} s"
            )
    finally:
        engine.close()


def _refuse(settings: Sequence[Setting], run: Run, reason: str) -> None:
    """The engine's own options depend on the hardware: the report says why a row is missing."""
    for setting in settings:
        directory = run.out / setting.name
        directory.mkdir(exist_ok=True)
        _write(directory / "config.json", config_of(setting, run))
        _write(directory / REFUSED, {"reason": reason})


def config_of(setting: Setting, run: Run) -> dict[str, Any]:
    digest = _digest(setting)
    data = {"data_sha256": digest} if digest else {}
    return {**setting.config, **data, "command": run.command}


def _digest(setting: Setting) -> str:
    """Of a file's bytes: a setting's name holds its path alone."""
    data = setting.suite.data
    return "" if data in SOURCES else hashlib.sha256(Path(data).read_bytes()).hexdigest()


def _check_data(setting: Setting, out: Path) -> None:
    """Raises ValueError where answers to other questions are under this setting's name."""
    before = (config_before(out, setting.name) or {}).get("data_sha256")
    if before and before != _digest(setting):
        raise ValueError(
            f"{setting.suite.data} is not what it was when {out / setting.name} was begun; give "
            "another --out, or remove what is there"
        )


def options_of(setting: Setting, run: Run) -> EngineOptions:
    suite = setting.suite
    longest = setting.tokens + suite.room
    dtype = served_dtype(Path(setting.model), suite.dtype)
    of_token = token_bytes(Path(setting.model), dtype)
    size = suite.contexts * (longest + 2 * suite.block_size) * of_token
    kept = max(1, sum(map(ours, suite.tasks)))  # contexts that the next setting finds again
    return EngineOptions(
        model=setting.model,
        max_model_len=longest,
        max_num_seqs=suite.contexts,
        block_size=suite.block_size,
        # Compressed prompts also need blocks of their own, and the next turn finds more cached.
        kv_cache_mib=max(64, (kept + 1) * size // MiB),
        dtype=dtype,
        threads=run.threads,
        enforce_eager=run.enforce_eager,
        multiprocess=run.multiprocess,
    )


def _run_setting(setting: Setting, run: Run, engine: Engine, bar: Bar) -> list[dict[str, Any]]:
    directory, suite = run.out / setting.name, setting.suite
    directory.mkdir(exist_ok=True)
    (directory / REFUSED).unlink(missing_ok=True)
    _write(directory / "config.json", config_of(setting, run))
    bar.say(f"{escape(setting.policy)}, {setting.mode}, {setting.question}")

    def answered() -> None:
        bar.advance()
        run.check()

    run.check()
    journal = Journal(directory / "journal.jsonl")
    bar.advance(len(journal.replies))
    lm = MODELS[setting.engine](
        pretrained=setting.model,
        question=setting.question,
        answers=suite.answers,
        losses=suite.losses,
        max_num_seqs=suite.contexts,
        engine=engine,
        journal=journal,
        answered=answered,
    )
    rows: list[dict[str, Any]] = []
    for name, options in suite.tasks.items():
        rows += question_rows(name, _evaluate(lm, setting, name, options), journal)
    with (directory / "predictions.jsonl").open("w") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    environment = {
        **machine(setting.engine, "transformers", "lm_eval"),
        "seeds": {"data": suite.seed, "lm_eval": SEED},
        "dtype": served_dtype(Path(setting.model), suite.dtype),
        "threads": run.threads,
        "engine_processes": "its own" if run.multiprocess else "this one",
        "kv_block_bytes": engine.block_bytes,
        "kv_blocks": engine.blocks,
        "seconds": round(journal.seconds, 1),
    }
    _write(directory / "environment.json", environment)
    _write(directory / "metrics.json", summary(rows))  # last: it says that the setting is done
    return rows


def _evaluate(lm: Any, setting: Setting, name: str, options: dict[str, Any]) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    suite = setting.suite
    found = simple_evaluate(
        lm,
        tasks=load(name, setting, options),
        task_manager=TaskManager(include_defaults=False),  # they are made: read none of its own
        limit=None if ours(name) else suite.limit,
        bootstrap_iters=0,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    return found["samples"]


def question_rows(name: str, samples: dict[str, Any], journal: Journal) -> list[dict[str, Any]]:
    """A row for each question: its answer, scores and costs."""
    waves, rows = journal.wave_of(), []
    for task, found in samples.items():
        filtered = [s for s in found if s.get("filter") == found[0].get("filter")]
        for sample in sorted(filtered, key=lambda s: s["doc_id"]):
            key, doc = f"{task}/{sample['doc_id']}", sample["doc"]
            reply, loss = journal.replies.get(key), journal.replies.get(key + LOSS)
            row = {
                "task": task,
                "doc": sample["doc_id"],
                "conversation": doc.get("conversation", f"{task}-{sample['doc_id']}"),
                "turn": doc.get("turn", 0),
                "answer": sample["target"] if "gold" not in doc else doc["gold"],
                **scores(sample),
            }
            if reply is not None:
                row |= {
                    "prediction": reply.text,
                    "prompt_tokens": reply.prompt_tokens,
                    "cached_tokens": reply.cached_tokens,
                    "first_token_seconds": reply.first_token_seconds,
                    "token_seconds": reply.token_seconds,
                    **costs(waves.get(key)),
                }
            if loss is not None and loss.losses:
                row |= {
                    "loss": sum(loss.losses) / len(loss.losses),
                    "agreement": sum(loss.agreed) / len(loss.agreed),
                }
            rows.append({k: round(v, 6) if type(v) is float else v for k, v in row.items()})
    return rows


def scores(sample: dict[str, Any]) -> dict[str, float]:
    """Ours by name; of other tasks the first that says something (RULER's lengths are -1 or a
    share, a log-likelihood's is acc)."""
    if "fixed" in sample:
        return {"fixed": sample["fixed"], "compat": sample["compat"]}
    values = [sample[metric] for metric in sample["metrics"]]
    told = [float(value) for value in values if isinstance(value, (int, float)) and value >= 0]
    first = told[0] if told else 0.0
    return {"fixed": first, "compat": first}


def costs(wave: dict[str, Any] | None) -> dict[str, float]:
    """A request's share of its wave; nothing of a wave that was cut short."""
    if wave is None:
        return {}
    requests = len(wave["keys"])
    found = {
        "held_bytes": wave["held_blocks"] * wave["block_bytes"] / requests,
        "peak_bytes": wave["peak_blocks"] * wave["block_bytes"] / requests,
        "freed_blocks": max(0, wave["peak_blocks"] - wave["held_blocks"]) / requests,
    }
    if wave["queries"]:
        found["cached_per_step"] = wave["cached"] / wave["queries"]
        found["read_per_step"] = wave["read"] / wave["queries"]
    return found


def _write(file: Path, data: object) -> None:
    write_whole(file, json.dumps(data, indent=1) + "\n")


def questions(setting: Setting) -> int:
    suite = setting.suite
    own = sum(map(ours, suite.tasks))
    asked = suite.contexts * suite.turns * (2 if suite.losses else 1) * own
    return asked + (len(suite.tasks) - own) * (suite.limit or 500)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
