"""The tasks as lm-eval documents: one for each turn, with all that was said before it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from kvplug_evals.llmlingua import parse_compressor
from kvplug_evals.scbench.generators import VOCABULARIES, Order
from kvplug_evals.scbench.scorers import score
from kvplug_evals.scbench.tasks import MAX_TURNS, MODES, asks, load, source, task_named

SAID = ("question", "cue", "gold", "close")
"""The pieces of an earlier turn, in their order."""
FENCE = "```"
COUNTS = ("tokens", "contexts", "turns")


def documents(
    task: str,
    *,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    data: str = "generated",
    tokens: int = 4096,
    contexts: int = 4,
    turns: int = MAX_TURNS,
    mode: str = MODES[0],
    seed: int = 0,
    vocabulary: str = "uuid",
    pairs: int = 0,
    hops: int = 4,
    distractors: int = 0,
    compressor: str = "",
    **_model_arguments: Any,
) -> dict[str, Any]:
    """What ``custom_dataset`` returns. lm-eval hands over its metadata and model arguments.

    ``data`` is generated, hub or a JSONL path; ``mode`` multi-turn (each turn sees the earlier
    ones with their true answers) or multi-request (the context and one question);
    ``compressor`` llmlingua(rate=0.5) or none. Raises ValueError.
    """
    import datasets

    for name, value in zip(COUNTS, (tokens, contexts, turns), strict=True):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    if turns > MAX_TURNS:
        raise ValueError(f"SCBench asks at most {MAX_TURNS} turns, got turns={turns}")
    if mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(MODES)}, got {mode!r}")
    if vocabulary not in VOCABULARIES:
        raise ValueError(f"vocabulary must be {' or '.join(VOCABULARIES)}, got {vocabulary!r}")
    folder = tokenizer or pretrained
    if folder is None:
        raise ValueError(
            "lengths are counted in the model's tokens: give pretrained or tokenizer, such as "
            '--metadata \'{"pretrained": "MODEL"}\''
        )
    words = encoder(folder)

    def count(text: str) -> int:
        return len(words(text, add_special_tokens=False).input_ids)

    order = Order(
        tokens=tokens,
        turns=turns,
        count=count,
        seed=seed,
        vocabulary=vocabulary,
        pairs=pairs,
        hops=hops,
        distractors=distractors,
    )
    named = task_named(task)
    found = load(
        task,
        data=data,
        contexts=contexts,
        order=order,
        middle=None if data == "generated" else tokens,
    )
    packed = parse_compressor(compressor) if compressor else None
    rows = []
    for number, conversation in enumerate(found):
        context = packed.compress(conversation.context) if packed else conversation.context
        said: list[dict[str, str]] = []
        for ask in asks(named, conversation, turns):
            turn = conversation.turns[ask.turn]
            rows.append(
                {
                    "task": task,
                    "source": source(task, data, vocabulary),
                    "conversation": conversation.id,
                    "number": number,
                    "mode": mode,
                    "turn": ask.turn,
                    "context": context,
                    "history": json.dumps(said),
                    "question": ask.question,
                    "cue": ask.cue,
                    "gold": ask.gold,
                    "answer": json.dumps(turn.answer),
                    "options": json.dumps(turn.options),
                    "metric": ask.metric,
                    "new_tokens": ask.new_tokens,
                    "until": json.dumps(ask.until),
                }
            )
            if mode == "multi-turn":
                said.append({name: getattr(ask, name) for name in SAID})
    return {"test": datasets.Dataset.from_list(rows)}


@cache
def encoder(folder: str) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # of contexts longer than the model's: the engine refuses those
    return AutoTokenizer.from_pretrained(folder)


def text(doc: dict[str, Any]) -> str:
    """The whole prompt, as a plain lm-eval model gets it."""
    said = "".join(part[name] for part in history(doc) for name in SAID)
    return f"{doc['context']}{said}{doc['question']}{doc['cue']}"


def history(doc: dict[str, Any]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(doc["history"])
    return found


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Both scores of one answer, and the fixed one under its turn."""
    said = results[0]
    if FENCE in doc["cue"]:  # the prompt opened the code block that the answer ends
        said = f"{doc['cue']}{said}\n{FENCE}"
    compat, fixed = score(
        doc["metric"], said, json.loads(doc["answer"]), json.loads(doc["options"])
    )
    return {"compat": compat, "fixed": fixed}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
