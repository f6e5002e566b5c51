"""LLMLingua-2: prompts compressed outside the engine, as a baseline for what happens inside.

Pan et al., "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt
Compression", ACL 2024, https://arxiv.org/abs/2403.12968. The real package does the work.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

MODEL = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"


def check() -> None:
    """Raises ValueError that says how to install it."""
    if find_spec("llmlingua") is None:
        raise ValueError(
            "llmlingua(rate=...) needs the package llmlingua, which is not installed here; "
            "install it with: pip install llmlingua"
        )


def compress(context: str, compressor: str, keep: float) -> str:
    """The context with the share ``keep`` of its tokens, chosen without the question."""
    if compressor != "llmlingua":
        raise ValueError(f"the prompt compressor must be llmlingua, got {compressor!r}")
    check()
    return str(_compressor().compress_prompt([context], rate=keep)["compressed_prompt"])


@cache
def _compressor() -> Any:
    from llmlingua import PromptCompressor

    return PromptCompressor(MODEL, use_llmlingua2=True, device_map="cpu")
