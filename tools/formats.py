"""What pages in codes hold, read and lose, beside what else saves as many bytes.

    make setup models
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/formats.py

For each line two engines. In 16 bits exact recall's model says how many tokens a pool of 64 MiB
holds, by the engine's own start-up line, and, behind a prompt of 2,039 tokens, how many bytes a
step of its answer reads, by kvplug's counters. In float32 SmolLM2 is fed three texts of Python's
own, 768 tokens as a prompt and 96 as its answer; the loss is the model's -log p of these, in nats
a token, over dense's. Budgets are shares of what dense holds, so that lines of one share hold
equal bytes. Minutes for each line.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from long_answers import losses
from prometheus_client import REGISTRY

from kvplug_evals.bench.provenance import provenance
from kvplug_evals.engines.interface import EngineError, EngineOptions, Request
from kvplug_evals.engines.vllm import VLLMEngine
from kvplug_evals.models.recall import recall_prompt
from kvplug_vllm.metrics import QUERIES, READ_BYTES

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

LINES = (
    "dense",
    "engine(kv_cache_dtype=fp8)",
    "kivi(bits=4)",
    "kivi(bits=4) + twilight(budget=0.125, bits=4)",
    "kivi(bits=4) + snapkv(budget={.5})",
    "snapkv(budget={.297})",
    "random(budget={.297})",
    "kivi(bits=2)",
    "random(budget={.188})",
    "kivi(bits=2, first=1, bits_first=4)",
    "twilight(budget=0.125)",
    "random(budget={.148})",
    "kivi(bits=8)",
)
"""{share} is that of a prompt's tokens: .297 are the bytes of four bits, .188 of two."""
POOL, CONTEXT, PROMPT, ANSWER = 64, 2048, 768, 96


@dataclass
class Row:
    line: str
    tokens: int | None = None
    """That the pool holds."""
    read: float | None = None
    """Bytes that a step reads of both layers."""
    loss: float | None = None
    """Nats a token."""
    refused: str | None = None
    """Why the engine did not start."""

    def shown(self) -> str:
        if self.refused is not None:
            return f"{self.line}: {self.refused}"
        lost = "" if self.loss is None else f", {self.loss:+.3f} nats"
        return f"{self.line}: {self.tokens:,} tokens, {self.read:,.0f} bytes a step{lost}"


def filled(line: str, tokens: int) -> str:
    while "{" in line:
        before, rest = line.split("{", 1)
        share, after = rest.split("}", 1)
        line = f"{before}{round(float(share) * tokens)}{after}"
    return line


def held_and_read(line: str, model: Path) -> tuple[int, float]:
    """Tokens that the pool holds, and bytes that a step reads."""
    options = EngineOptions(
        model=str(model), max_model_len=CONTEXT, max_num_seqs=4, dtype="bfloat16",
        kv_cache_mib=POOL, multiprocess=False,
    )  # fmt: skip
    engine = VLLMEngine(shallow(filled(line, CONTEXT)), options)
    tokens = int(engine.engine.vllm_config.cache_config.kv_cache_size_tokens)
    before = counted()
    made = recall_prompt(CONTEXT - 10, 64, 1, seed=0)
    prompt = [*made.tokens, made.questions[0]]
    engine.run([Request(key="0", prompt=prompt, forced=prompt[:8], scored=8)])
    queries, read = (b - a for a, b in zip(before, counted(), strict=True))
    engine.close()
    return tokens, read / queries


def shallow(line: str) -> str:
    """What chooses does so in both layers of the recall model."""
    return line.replace("twilight(budget=0.125", "twilight(dense_layers=0, budget=0.125")


def counted() -> list[float]:
    """Steps of a request, and the bytes that they read."""
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    return [
        sum(each.value for each in samples if each.name == str(counter))
        for counter in (QUERIES, READ_BYTES)
    ]


def loss(line: str, model: Path) -> float:
    found, _ = losses(filled(line, PROMPT), model, PROMPT, ANSWER, multiprocess=False)
    return mean(found)


def table(source: dict[str, object], rows: list[Row]) -> str:
    """What the JSON says, its first row the measure of others."""
    dense, wide = rows[0], max(len(row.line) for row in rows)
    lines = [
        f"{source['command']}",
        f"{source['date']}, commit {source['commit']}, vLLM {source['vllm']}, torch "
        f"{source['torch']}, {source['cpu']}, one thread of {source['cores']} cores",
        f"exact recall's model in bfloat16, {CONTEXT:,} tokens, blocks of 32, {POOL} MiB of pool; "
        "{share} is of a prompt's tokens; nats a token over dense",
        "",
        f"{'policy':<{wide}}  pool, tokens  of dense  bytes a step  of dense  loss",
    ]
    for row in rows:
        if row.tokens is None or row.read is None or dense.tokens is None or dense.read is None:
            lines.append(f"{row.line:<{wide}}  {row.refused}")
            continue
        lost = "" if row.loss is None else f"{row.loss:+.3f}"
        lines.append(
            f"{row.line:<{wide}}  {row.tokens:>12,}  {row.tokens / dense.tokens:>7.2f}x  "
            f"{row.read:>12,.0f}  {row.read / dense.read:>8.1%}  {lost}".rstrip()
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, default=Path(".models/smollm2"))
    parser.add_argument("--recall", type=Path, default=Path(".models/recall"))
    parser.add_argument("--no-losses", action="store_true", help="what is held and read alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("lines", nargs="*", default=LINES)
    given = parser.parse_args()
    source, rows = provenance(shlex.join(["python", *sys.argv]), "vllm"), []
    dense = None if given.no_losses else loss("dense", given.smollm2)
    for line in given.lines:
        row = Row(line)
        try:
            row.tokens, row.read = held_and_read(line, given.recall)
            if dense is not None:
                row.loss = 0.0 if line == "dense" else loss(line, given.smollm2) - dense
        except EngineError as error:
            row.refused = str(error).split(". Its own message", 1)[0]
        print(row.shown(), flush=True)
        rows.append(row)
        if given.out:
            source["load_at_end"] = os.getloadavg()[0]
            found = {"provenance": source, "dense": dense, "rows": [asdict(each) for each in rows]}
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            given.out.with_suffix(".txt").write_text(table(source, rows))


if __name__ == "__main__":
    main()
