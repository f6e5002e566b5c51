"""RANK JOBS OUT: one of two tensor-parallel ranks, with a scheduler for each server of the jobs.

Both ranks are given the same requests at the same pass of their event loops, which is all that
SGLang's first rank tells the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from conftest import start


def serve(model: Path, batches: list[list[list[int]]], job: dict[str, Any], rank: int) -> Any:
    """All prompts of a batch at once, under each of the policies that the job asks for."""
    with start(model, job["kvplug"], rank=rank, tp_size=2, **job["options"]) as engine:
        answers = []
        for batch in batches:
            rids = [engine.send(prompt, 12, ask) for ask in job["asks"] for prompt in batch]
            engine.drain()
            answers.append([engine.output(rid) for rid in rids])
        backend = engine.backend
        return {
            "answers": answers,
            "planned_steps": int(backend.planned_steps),
            "packed_prompts": backend.packed_prompts,
            "selected_queries": backend.selected_queries,
            "free": sum(engine.free),
            "kv_heads": backend.token_to_kv_pool.head_num,
            "overlap": engine.scheduler.enable_overlap,
        }


def main(rank: str, jobs: str, out: str) -> None:
    asked = json.loads(Path(jobs).read_text())
    model, batches = Path(asked["model"]), asked["batches"]
    found = [serve(model, batches, job, int(rank)) for job in asked["servers"]]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
