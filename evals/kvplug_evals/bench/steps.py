"""An engine in a process of its own, whose every step is timed: for benchmarks that hold one
engine's steps against another's, in turn."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from kvplug_evals.bench.options import Clock

DECODES = 12
"""Steps behind the one that gives requests their first token."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """How an engine is started. Its process must know of one thread before it loads torch, and of
    ``VLLM_ENABLE_V1_MULTIPROCESSING=0``, so that its steps are that process's."""

    model: Path
    tokens: int
    """Of a prompt, at most."""
    chunk: int
    block_size: int
    kv_cache_mib: int
    clock: Clock
    dtype: str = "auto"
    at_once: int = 1
    allow: tuple[str, ...] = ()
    """Policies that requests may choose beside the engine's own."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Of requests that were sent together, in milliseconds."""

    first_token: float
    """All steps until each had its first token."""
    behind: list[float]
    """Each of the ``DECODES`` steps behind them."""
    packed: int
    """Layers that packed a prompt."""


def serve(line: str, how: Worker, asked: Connection) -> None:
    """Answers lists of prompts, and the policy that they choose, with Timed until it is sent
    None."""
    from vllm import LLM, SamplingParams

    from kvplug_evals.engines.vllm import REQUEST_FIELD

    kvplug = {"policy": line, **({"allow": list(how.allow)} if how.allow else {})}
    llm = LLM(
        str(how.model), attention_backend="kvplug",
        additional_config={"kvplug": kvplug}, enforce_eager=True, dtype=how.dtype,
        block_size=how.block_size, max_num_batched_tokens=how.chunk,
        max_model_len=how.tokens + DECODES + 1, max_num_seqs=how.at_once,
        kv_cache_memory_bytes=how.kv_cache_mib << 20, skip_tokenizer_init=True,
        async_scheduling=False,
    )  # fmt: skip
    engine = llm.llm_engine
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    clock = process_time if how.clock is Clock.CPU else perf_counter

    def packed() -> int:
        return sum(layer.impl.packed_prompts for layer in layers)

    asked.send("ready")
    number = 0
    while (sent := asked.recv()) is not None:
        prompts, policy = sent
        parameters = SamplingParams(
            temperature=0, max_tokens=DECODES + 1, ignore_eos=True, detokenize=False,
            extra_args=None if policy is None else {REQUEST_FIELD: policy},
        )  # fmt: skip
        before = packed()
        for prompt in prompts:
            engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
            number += 1
        first, behind, tokens = 0.0, [], dict[str, int]()
        while engine.has_unfinished_requests():
            begun = len(tokens) == len(prompts)
            began = clock()
            outputs = engine.step()
            took = (clock() - began) * 1e3
            if begun and outputs:
                behind.append(took)
            else:
                first += took
            tokens |= {one.request_id: len(one.outputs[0].token_ids) for one in outputs}
        assert len(behind) == DECODES, f"{len(behind)} steps behind the prompts"
        asked.send(Timed(first_token=first, behind=behind, packed=packed() - before))


class Engine:
    """A worker, seen from the process that asks."""

    def __init__(self, line: str, how: Worker) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.asks, asked = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(line, how, asked), daemon=True)
        self.process.start()
        asked.close()
        assert self.answer() == "ready"

    def ask(self, *prompts: Sequence[int], policy: str | None = None) -> Timed:
        """Prompts that are sent together. policy: of those allowed, else the engine's own."""
        self.asks.send(([list(prompt) for prompt in prompts], policy))
        found: Timed = self.answer()
        return found

    def answer(self) -> Any:
        try:
            return self.asks.recv()
        except EOFError:
            raise RuntimeError("an engine ended, its reason is above") from None


@contextmanager
def engine(line: str, how: Worker) -> Iterator[Engine]:
    started = Engine(line, how)
    try:
        yield started
    finally:
        started.process.terminate()
        started.process.join()
