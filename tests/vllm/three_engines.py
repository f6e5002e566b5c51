"""MODEL: what each of three engines admits, in one process, each core in its own. Prints JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"

FIRST = {"policy": "dense", "allow": ["snapkv"], "max_budget": 160}
SECOND = {"policy": "dense", "allow": ["quest"]}
CHOICES = "snapkv(budget=128)", "quest(budget=64)"


def engine(model: str, kvplug: dict[str, Any] | None) -> Any:
    from vllm import LLM

    selected = {"attention_backend": "kvplug", "additional_config": {"kvplug": kvplug}}
    return LLM(
        model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=512,
        kv_cache_memory_bytes=32 << 20, skip_tokenizer_init=True, max_num_seqs=4,
        **(selected if kvplug else {}),
    )  # fmt: skip


def answers(llm: Any, *choices: str | None) -> list[Any]:
    """To the choices, all at once: how each request ended and with how many tokens."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": list(range(200))} for _ in choices],
        [
            SamplingParams(
                temperature=0, max_tokens=8, ignore_eos=True, detokenize=False,
                extra_args={"kvplug": choice} if choice else None,
            )
            for choice in choices
        ],
        use_tqdm=False,
    )  # fmt: skip
    return [(o.outputs[0].finish_reason, len(o.outputs[0].token_ids)) for o in outputs]


def said(llm: Any, choice: str) -> Any:
    try:
        return answers(llm, choice)
    except ValueError as error:
        return str(error)


def main(model: str) -> None:
    first, second, stock = (engine(model, kvplug) for kvplug in (FIRST, SECOND, None))
    found: dict[str, Any] = {
        name: [said(llm, choice) for choice in CHOICES]
        for name, llm in (("first", first), ("second", second), ("stock", stock))
    }
    # Let through by whoever does not know kvplug.
    from vllm.v1.engine.input_processor import InputProcessor

    while hasattr(InputProcessor.process_inputs, "__wrapped__"):
        InputProcessor.process_inputs = InputProcessor.process_inputs.__wrapped__  # type: ignore[method-assign]
    found["let through"] = answers(first, None, CHOICES[1], CHOICES[0])
    found["later"] = answers(first, CHOICES[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
