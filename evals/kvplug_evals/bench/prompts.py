"""Prompts for a server under load: of one length, and none begins as another does."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

from kvplug_evals.models.recall import (
    SYMBOLS,
    VOCAB,
    build_recall_model,
    recall_prompt,
    word,
)

KV_HEADS, GROUP = 8, 4
"""Of an 8B Llama."""
PAIRS = 128
"""The pairs form one ring: an answer of any length is look-ups throughout."""
SHIFT = 1009
"""Tokens from the beginning of a prompt to that of the next one; a prime."""
MARGIN = 32
"""Tokens by which a text may grow when it is cut, joined and tokenized again."""


def recall_8b(models: Path) -> Path:
    """The recall model with the attention heads of an 8B Llama, built where it is not yet."""
    folder = models / f"recall-{KV_HEADS}x{GROUP}-live-0"
    if not (folder / "config.json").exists():
        build_recall_model(folder, kv_heads=KV_HEADS, group=GROUP)
    return folder


def prompts(model: Path, tokens: int) -> Iterator[str]:
    """Endless. Of the recall model's words where the tokenizer is its own, else of Python's
    language reference."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if len(tokenizer) == VOCAB and tokenizer.convert_ids_to_tokens(SYMBOLS) == word(SYMBOLS):
        return _look_ups(tokens)
    topics = sorted(pydoc_data.topics.topics.items())
    ids = tokenizer("\n\n".join(text for _, text in topics), verbose=False)["input_ids"]
    return _texts(tokenizer, ids * (1 + tokens // len(ids)), tokens)


def _look_ups(tokens: int) -> Iterator[str]:
    seed = 0
    while True:
        made = recall_prompt(tokens - 1, PAIRS, 1, seed)
        yield f"{made.text} {word(made.questions[0])}"
        seed += 1


def _texts(tokenizer: object, ids: list[int], tokens: int) -> Iterator[str]:
    place = 0
    while True:
        start = place * SHIFT % (len(ids) - tokens + 1)
        yield tokenizer.decode(ids[start : start + tokens])  # type: ignore[attr-defined]
        place += 1
