"""MODEL OUT: what each engine of a process admits, each core in a process of its own; as JSON.

The third, a stock one, is there as far as it admits.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"

FIRST = {"policy": "dense", "allow": ["snapkv"], "max_budget": 160}
SECOND = {"policy": "dense", "allow": ["quest"]}
CHOICES = "snapkv(budget=128)", "quest(budget=64)"
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 512,
    "kv_cache_memory_bytes": 32 << 20, "skip_tokenizer_init": True, "max_num_seqs": 4,
}  # fmt: skip


def engine(model: str, kvplug: dict[str, Any]) -> Any:
    from vllm import LLM

    config = {"kvplug": kvplug}
    return LLM(model, attention_backend="kvplug", additional_config=config, **OPTIONS)


def parameters(choice: str | None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False,
        extra_args={"kvplug": choice} if choice else None,
    )  # fmt: skip


def answers(llm: Any, *choices: str | None) -> list[Any]:
    """To the choices, all at once: how each request ended and with how many tokens."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(range(200))} for _ in choices],
        [parameters(choice) for choice in choices],
        use_tqdm=False,
    )
    return [(o.outputs[0].finish_reason, len(o.outputs[0].token_ids)) for o in outputs]


def stock_front(model: str) -> Callable[[str | None], Any]:
    """Asks a stock engine, as far as to its core: the prompt that this would get."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    front = InputProcessor(EngineArgs(model, **OPTIONS).create_engine_config())

    def ask(choice: str | None) -> Any:
        prompt = {"prompt_token_ids": [1, 2, 3]}
        request = front.process_inputs("stock", prompt, parameters(choice), ("generate",))
        return request.prompt_token_ids

    return ask


def said(ask: Callable[[str], Any], choice: str) -> Any:
    from vllm.exceptions import VLLMValidationError

    try:
        return ask(choice)
    except VLLMValidationError as error:
        return str(error)


def main(model: str, out: str) -> None:
    first, second, stock = engine(model, FIRST), engine(model, SECOND), stock_front(model)
    asked = {"first": partial(answers, first), "second": partial(answers, second), "stock": stock}
    found: dict[str, Any] = {
        name: [said(ask, choice) for choice in CHOICES] for name, ask in asked.items()
    }
    found["stock, nothing asked"] = stock(None)
    # Let through by whoever does not know kvplug.
    from vllm.v1.engine.input_processor import InputProcessor

    while hasattr(InputProcessor.process_inputs, "__wrapped__"):
        InputProcessor.process_inputs = InputProcessor.process_inputs.__wrapped__  # type: ignore[method-assign]
    found["let through"] = answers(first, None, CHOICES[1], CHOICES[0])
    found["later"] = answers(first, CHOICES[0])
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
