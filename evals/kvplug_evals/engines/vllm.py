"""vLLM, driven step by step, so that every step's use of the cache is seen.

The engine runs in processes of its own, as a server's does. kvplug's counters come from there
through prometheus_client's files.
"""

from __future__ import annotations

import gc
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from vllm.v1.metrics.loggers import StatLoggerBase

from kvplug import Planner, Settings, parse
from kvplug.compiling import REQUEST, repetitions
from kvplug_evals.engines.interface import EngineError, EngineOptions, MiB, Reply, Request, Wave
from kvplug_evals.engines.running import (
    COUNTERS,
    SETTLED,
    STAY,
    Running,
    check_lengths,
    end_tokens,
)
from kvplug_evals.engines.stock import Stock, is_stock, parse_stock
from kvplug_evals.models.folder import served_dtype

FORCED, REQUEST_FIELD = "kvplug_forced", "kvplug"
READS = 20


class Usage(StatLoggerBase):
    """The share of the pool that is held, after each step."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.share = 0.0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.share = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        pass


class VLLMEngine:
    """One policy, or ``engine(...)`` for one of vLLM's own options; one engine.

    Raises EngineError, and ValueError for an ``engine(...)`` that cannot be read.
    """

    def __init__(self, policy: str, options: EngineOptions) -> None:
        self.stock = parse_stock(policy) if is_stock(policy) else None
        self.counters = Path(tempfile.mkdtemp(prefix="kvplug-counters-"))
        self.options = options
        self.usage: Usage | None = None
        with ExitStack() as outside:
            outside.callback(shutil.rmtree, self.counters, ignore_errors=True)
            outside.enter_context(changed_environment(variables(options, self.counters)))
            self.engine = self._started(policy)
            self.outside = outside.pop_all()
        config = self.engine.vllm_config.cache_config
        self.blocks = int(config.num_gpu_blocks) - 1  # one is vLLM's own, the null block
        self.block_bytes = options.kv_cache_mib * MiB // int(config.num_gpu_blocks)
        self.tokenizer = self.engine.get_tokenizer()
        self.ends = end_tokens(options.model)
        self.requests = 0
        self.chunk = 0 if self.stock else chunk_of(policy, options.block_size)
        self.reuses = self.stock is None and parse(policy).reuse is not None
        self.prepared: set[tuple[int, ...]] = set()
        """Prompts that were sent before others were timed."""

    def _started(self, policy: str) -> Any:
        options = self.options
        if not options.multiprocess:
            torch.set_num_threads(options.threads)  # torch is loaded, its environment read
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        def usage(vllm_config: Any, engine_index: int = 0) -> Usage:
            self.usage = Usage(vllm_config, engine_index)
            return self.usage

        arguments = EngineArgs(
            model=options.model,
            dtype=served_dtype(Path(options.model), options.dtype),
            **(self.stock.arguments if self.stock else served_by_kvplug(policy, options)),
            block_size=options.block_size,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            kv_cache_memory_bytes=options.kv_cache_mib * MiB,
            enforce_eager=options.enforce_eager,
            enable_prefix_caching=True,
            logits_processors=["kvplug_evals.engines.forced:ForcedTokens"],
            logprobs_mode="raw_logprobs",
            disable_log_stats=False,
            seed=0,
        )
        try:
            return LLMEngine.from_engine_args(arguments, stat_loggers=[usage])
        except (RuntimeError, ValueError) as error:
            advice = "`kvplug doctor --model MODEL --policy POLICY` says what would be refused"
            if self.stock is not None:
                advice = "kvplug has no part in it"
            raise EngineError(
                f"vLLM did not start with {policy!r}: {error}. Its own message is above; {advice}"
            ) from error

    def run(
        self, requests: Sequence[Request], finished: Callable[[Reply], object] | None = None
    ) -> Wave:
        """All requests stay until each has decoded a little, so that what they hold together is
        seen: the first would otherwise be gone before the last is prefilled.
        """
        check_lengths(requests, self.options.max_model_len)
        if self.chunk:
            prompts = (
                prompt for each in requests for prompt in repetitions(each.prompt, self.chunk)
            )
            self._prepare(prompts, {REQUEST_FIELD: REQUEST})
        if self.reuses:
            spans = ((each.prompt, span) for each in requests for span in each.chunks)
            self._prepare((prompt[slice(*span)] for prompt, span in spans), None)
        before, started = self._counted(), time.monotonic()
        steps = (
            sum(len(request.prompt) for request in requests) // self.options.max_num_batched_tokens
        )
        running = {
            self._submit(request, STAY + steps): Running(request, started, self.ends)
            for request in requests
        }
        replies: dict[str, Reply] = {}
        peak, held, settled = 0, [], False
        while self.engine.has_unfinished_requests():
            outputs, now = self.engine.step(), time.monotonic()
            blocks = self._held()
            peak = max(peak, blocks)
            for output in outputs:
                state = running[output.request_id]
                self._see(state, output, now)
                if state.done and state.request.key not in replies:
                    reply = replies[state.request.key] = state.reply(self.tokenizer)
                    if finished is not None:
                        finished(reply)
            states = running.values()
            if all(state.steps >= SETTLED for state in states):
                if not any(state.gone for state in states):
                    held.append(blocks)
                settled = True
            if settled:
                leaving = [n for n, state in running.items() if state.done and not state.gone]
                self.engine.abort_request(leaving)
                for name in leaving:
                    running[name].gone = True
        after = self._counted()
        queries, cached, read = (b - a for a, b in zip(before, after, strict=True))
        if self.stock is not None:
            queries, cached, read = computed(self.stock, running.values())
        return Wave(
            replies=[replies[request.key] for request in requests],
            seconds=time.monotonic() - started,
            peak_blocks=peak,
            held_blocks=round(median(held)) if held else peak,
            queries=queries,
            cached=cached,
            read=read,
        )

    def _prepare(self, prompts: Iterable[list[int]], extra_args: dict[str, Any] | None) -> None:
        """Let each be read, once."""
        from vllm import SamplingParams

        for prompt in prompts:
            if (known := tuple(prompt)) in self.prepared:
                continue
            self.prepared.add(known)
            self.requests += 1
            own = SamplingParams(max_tokens=1, extra_args=extra_args, detokenize=False)
            self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, own)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def forget(self) -> None:
        self.prepared.clear()
        if not self.engine.reset_prefix_cache():
            raise EngineError("vLLM could not empty its prefix cache; no request may be running")

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.engine
        if not self.options.multiprocess:
            cleanup_dist_env_and_memory()
        gc.collect()
        self.outside.close()

    def _submit(self, request: Request, stay: int) -> str:
        from vllm import SamplingParams

        self.requests += 1
        chosen: dict[str, Any] = {} if request.policy is None else {REQUEST_FIELD: request.policy}
        if self.reuses and request.chunks:
            chosen = {REQUEST_FIELD: {"chunks": [list(span) for span in request.chunks]}}
        parameters = SamplingParams(
            temperature=0,
            max_tokens=len(request.forced) + request.new_tokens + stay,
            ignore_eos=True,
            extra_args={FORCED: list(request.forced), **chosen},
            logprobs=0 if request.scored else None,
            detokenize=False,
        )
        prompt: Any = {"prompt_token_ids": request.prompt}
        name = str(self.requests)
        self.engine.add_request(name, prompt, parameters)
        return name

    def _see(self, state: Running, output: Any, now: float) -> None:
        completion = output.outputs[0]
        state.cached = output.num_cached_tokens or state.cached
        state.add(completion.token_ids[state.steps :], now, self.tokenizer)
        if completion.logprobs:
            state.scores = [
                (step[token].logprob, step[token].rank == 1)
                for token, step in zip(state.tokens, completion.logprobs, strict=False)
            ]
        state.gone |= output.finished
        if state.gone and not state.done:
            wanted = len(state.request.forced) + state.request.new_tokens
            raise EngineError(
                f"vLLM ended {state.request.key} after {len(state.tokens)} of {wanted} tokens: "
                f"{completion.finish_reason}"
            )

    def _held(self) -> int:
        assert self.usage is not None
        return round(self.usage.share * self.blocks)

    def _counted(self) -> tuple[float, float, float]:
        """Decode queries, tokens behind them and tokens read, since the engine's start."""
        from prometheus_client import REGISTRY, CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = REGISTRY
        if self.options.multiprocess:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, path=str(self.counters))
        totals = dict.fromkeys(COUNTERS, 0.0)
        for sample in self._samples(registry):
            if sample.name in totals:
                totals[sample.name] += sample.value
        queries, cached, read = totals.values()
        return queries, cached, read

    @staticmethod
    def _samples(registry: Any) -> list[Any]:
        """A worker may be adding a counter to the file that is read: then read it once more."""
        for left in reversed(range(READS)):
            try:
                return [sample for metric in registry.collect() for sample in metric.samples]
            except (RuntimeError, ValueError, struct.error):
                if not left:
                    raise
                time.sleep(0.1)
        raise AssertionError


def chunk_of(policy: str, block_size: int) -> int:
    """Tokens that a policy compiles together; 0 where it compiles nothing."""
    composed = parse(policy)
    if composed.scored is None or not composed.scored.compiles:
        return 0
    return Planner(Settings(policy=composed), block_size).chunk * block_size


def served_by_kvplug(policy: str, options: EngineOptions) -> dict[str, Any]:
    return {
        "attention_backend": "kvplug",
        "additional_config": {"kvplug": options.offer(policy)},
    }


def computed(stock: Stock, states: Iterable[Running]) -> tuple[int, int, int]:
    """What kvplug's counters would say: each token but the first is a decode query's."""
    behind = [
        len(state.request.prompt) + step for state in states for step in range(1, state.steps)
    ]
    return len(behind), sum(behind), sum(map(stock.reads, behind))


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Of this process and what it starts, until the end: then each is as it was, or unset."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def variables(options: EngineOptions, counters: Path) -> dict[str, str]:
    """Of the engine's processes, and before it of ours, which they inherit."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(options.multiprocess)),
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # forced tokens are a processor of Model Runner V1
        # Left to itself vLLM keeps a core free, which is half of a machine of two.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        **({"PROMETHEUS_MULTIPROC_DIR": str(counters)} if options.multiprocess else {}),
    }
