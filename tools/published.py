"""kvplug/advice/published.json: what lines lose, out of the results that are published.

    python tools/published.py        # in vLLM's environment: the evals' own reader

Taken are the settings of a conversation in which the compression sees the question, on tasks that
dense answers (half of them, or more), and the losses that the documentation's tables state.
tests/evals/test_advice.py fails where the file is stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvplug_evals.sweep.results import Result, results

ROOT = Path(__file__).parents[1]
FILE = ROOT / "kvplug/advice/published.json"
RECALL = ("recall-cpu", "recall-tokens-cpu", "recall-formats-cpu")
TEXT = ("smollm2-cpu", "smollm2-tokens-cpu")
EVIDENCE = "docs/evidence.md"
# Tables of EVIDENCE -> tokens, and a line's loss on source and on documentation, or on answers.
LONG_PROMPTS = {
    4096: {
        "xattention(threshold=None, budget=704)": (0.033, 0.048),
        "xattention(threshold=None, budget=704, stride=16)": (0.042, 0.051),
        "block_quest(budget=704)": (0.067, 0.101),
        "a_shape(window=512)": (0.073, 0.122),
    },
    7936: {
        "xattention(threshold=None, budget=704)": (0.096, 0.058),
        "a_shape(window=512)": (0.164, 0.103),
        "block_quest(budget=704)": (0.174, 0.144),
    },
}

LONG_ANSWERS = {"kivi(bits=4)": 0.011, "kivi(bits=2)": 0.314}
"""Behind prompts of 512 tokens, of 1,024."""


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def measured(folder: str) -> Iterator[dict[str, Any]]:
    """Rows of one sweep."""
    found = [each for each in results(ROOT / "evals/results" / folder) if wanted(each)]
    dense = {each.peers: each for each in found if each.policy == "dense"}
    for each in found:
        if each.policy == "dense" or each.peers not in dense:
            continue
        for task in sorted({row["task"] for row in each.rows}):
            own, whole = each.of_task(task), dense[each.peers].of_task(task)
            if mean(whole, "fixed") < 0.5 or "loss" not in own[0]:
                continue
            row = {
                "policy": each.policy,
                "tokens": round(mean(own, "prompt_tokens")),
                "task": task,
                "model": each.config["model"].rpartition("/")[2],
                "source": f"evals/results/{folder}/report.md",
            }
            if folder in RECALL:
                yield {**row, "found": round(mean(own, "agreement"), 3)}
            else:
                yield {**row, "loss": round(mean(own, "loss") - mean(whole, "loss"), 3)}


def wanted(result: Result) -> bool:
    _, _, mode, question = result.place
    return mode == "multi-turn" and question == "aware"


def stated() -> Iterator[dict[str, Any]]:
    for tokens, lines in LONG_PROMPTS.items():
        for policy, losses in lines.items():
            for task, loss in zip(("source", "documentation"), losses, strict=True):
                yield {
                    "policy": policy, "tokens": tokens, "task": task, "model": "smollm2",
                    "source": EVIDENCE, "loss": loss,
                }  # fmt: skip
    for policy, loss in LONG_ANSWERS.items():
        yield {
            "policy": policy, "tokens": 1536, "task": "answers", "model": "smollm2",
            "source": EVIDENCE, "loss": loss,
        }  # fmt: skip


def render() -> str:
    rows = [row for folder in (*TEXT, *RECALL) for row in measured(folder)]
    lines = [json.dumps(row) for row in [*rows, *stated()]]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(render())
