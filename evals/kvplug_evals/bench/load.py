"""Loads for a server, sent by the load generator that its engine brings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug_evals.engines.interface import EngineError
from kvplug_evals.served.engine import NAME, Engine


@dataclass(frozen=True, kw_only=True)
class Load:
    prompts: Sequence[str]
    at_once: int
    """Requests in flight."""
    output: int
    """Tokens of each answer."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What the generator says of one load."""

    output_tokens_per_second: float
    ttft_ms: float
    """Median over the requests, as are the others."""
    tpot_ms: float
    itl_ms: float
    replies: list[str]
    """In one order for every server."""


def send(load: Load, engine: Engine, url: str, folder: Path) -> Sent:
    """Raises EngineError with the generator's last words."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, result, log = (folder / name for name in ("prompts.jsonl", "result.json", "log"))
    prompts.write_text("".join(f"{_line(prompt)}\n" for prompt in load.prompts))
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", *GENERATORS[engine.package](load, result)]
    common = [
        *("--base-url", url, "--model", NAME, "--tokenizer", str(engine.model)),
        *("--dataset-name", "custom", "--dataset-path", str(prompts)),
        *("--num-prompts", str(len(load.prompts)), "--max-concurrency", str(load.at_once)),
        "--disable-tqdm",
    ]
    with log.open("w") as out:
        done = subprocess.run(
            [*command, *common], stdout=out, stderr=subprocess.STDOUT, env=engine.environment()
        )
    if done.returncode or not result.exists():
        last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise EngineError(
            f"{engine.title}'s load generator ended with {done.returncode}. The last that {log} "
            f"says:\n{last}"
        )
    return _read(json.loads(result.read_text()), load, engine)


def _read(found: dict[str, Any], load: Load, engine: Engine) -> Sent:
    wanted = len(load.prompts)
    if found["completed"] != wanted:
        errors = sorted({str(error) for error in found.get("errors") or [] if error})
        raise EngineError(
            f"{engine.title} answered {found['completed']} of {wanted} requests: {errors[:2]}"
        )
    return Sent(
        output_tokens_per_second=found["output_throughput"],
        ttft_ms=found["median_ttft_ms"],
        tpot_ms=found["median_tpot_ms"],
        itl_ms=found["median_itl_ms"],
        replies=found["generated_texts"],
    )


def _line(prompt: str) -> str:
    """As either generator reads it."""
    return json.dumps({"prompt": prompt, "conversations": [{"content": prompt}, {"content": "."}]})


def _vllm(load: Load, result: Path) -> list[str]:
    return [
        *("vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"),
        *("--custom-output-len", str(load.output), "--ignore-eos", "--temperature", "0"),
        *("--disable-shuffle", "--skip-chat-template"),
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def _sglang(load: Load, result: Path) -> list[str]:
    # It shuffles, by a seed of its own that is the same in every run.
    return [
        *("sglang.benchmark.serving", "--backend", "sglang-oai"),
        *("--sharegpt-output-len", str(load.output), "--warmup-requests", "0"),
        *("--output-file", str(result), "--output-details"),
    ]


GENERATORS: dict[str, Callable[[Load, Path], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
}
