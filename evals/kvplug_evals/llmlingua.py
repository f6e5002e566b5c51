"""LLMLingua-2: prompts compressed outside the engine, as a baseline for what happens inside.

Pan et al., "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt
Compression", ACL 2024, https://arxiv.org/abs/2403.12968. The real package does the work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

MODEL = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
WRITE = "write llmlingua(rate=0.5) or llmlingua(rate=0.5, model=FOLDER)"


@dataclass(frozen=True)
class Compressor:
    """Keeps the share ``rate`` of a context's words, chosen without the question."""

    rate: float
    model: str = MODEL
    """On the hub, or a folder. The package tells how words are cut from the name: it must hold
    bert-base-multilingual-cased or xlm-roberta-large."""

    def __str__(self) -> str:
        model = "" if self.model == MODEL else f", model={self.model}"
        return f"llmlingua(rate={self.rate}{model})"

    def compress(self, context: str) -> str:
        packed = _package(self.model).compress_prompt([context], rate=self.rate)
        return str(packed["compressed_prompt"])


def is_compressor(line: str) -> bool:
    return line.startswith("llmlingua")


def parse_compressor(line: str) -> Compressor:
    """Raises ValueError that says what to write or to install."""
    found = re.fullmatch(r"llmlingua\(\s*rate=([\d.]+)\s*(?:,\s*model=([^,()]+?)\s*)?\)", line)
    if found is None:
        raise ValueError(f"{WRITE}, got {line!r}")
    try:
        rate = float(found[1])
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1:
        raise ValueError(f"{WRITE}, a share above 0 and up to 1; got rate={found[1]}")
    model = found[2] or MODEL
    if not any(kind in model for kind in ("bert-base-multilingual-cased", "xlm-roberta-large")):
        raise ValueError(
            "llmlingua compresses with models whose name holds bert-base-multilingual-cased or "
            f"xlm-roberta-large; got model={model}: rename the folder"
        )
    if find_spec("llmlingua") is None:
        raise ValueError(
            "llmlingua(rate=...) needs the package llmlingua, which is not installed here; "
            "install it with: pip install llmlingua"
        )
    return Compressor(rate, model)


@cache
def _package(model: str) -> Any:
    from llmlingua import PromptCompressor

    return PromptCompressor(model, use_llmlingua2=True, device_map="cpu")
