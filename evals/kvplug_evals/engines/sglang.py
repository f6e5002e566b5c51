"""SGLang's own server, asked over HTTP.

A wave is one streamed request of many prompts. What the server says of its pool is read while the
wave lasts; kvplug's counters come from ``/metrics``. Forced tokens need a server that runs what a
request brings along, so it listens on this machine alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from kvplug import read_offer
from kvplug_evals.engines.forced_sglang import FORCED, SCORED, SCORES, ForcedTokens
from kvplug_evals.engines.interface import EngineError, EngineOptions, MiB, Reply, Request, Wave
from kvplug_evals.engines.running import (
    COUNTERS,
    SETTLED,
    STAY,
    Running,
    check_lengths,
    end_tokens,
)
from kvplug_evals.models.folder import served_dtype, token_bytes
from kvplug_evals.scbench.documents import encoder
from kvplug_evals.served import process

START_SECONDS = 900
FLUSH_SECONDS = 60
SAMPLE_SECONDS = 0.05
SPARED = 2
"""Tokens of its context length that SGLang never serves."""
GiB = 1 << 30


class SGLangEngine:
    """One policy, one server. Raises EngineError."""

    def __init__(self, policy: str, options: EngineOptions) -> None:
        if not options.multiprocess:
            raise EngineError(
                "SGLang's server runs in processes of its own; drop --in-process (multiprocess)"
            )
        try:
            offer = read_offer(options.offer(policy), environ={})
            model = Path(options.model)
            dtype = served_dtype(model, options.dtype)
            of_token = token_bytes(model, dtype)
            pages, rows = offer.digest_rows(options.block_size, getattr(torch, dtype).itemsize)
        except ValueError as error:
            raise EngineError(f"SGLang cannot serve {policy!r}: {error}") from None
        if offer.settings.policy.reuse is not None:
            raise EngineError(
                f"kvplug's evals name no chunks to SGLang yet; evaluate {policy!r} in vLLM"
            )
        self.options = options
        self.tokenizer = encoder(options.model)
        self.ends = end_tokens(options.model)
        self.processor = ForcedTokens.to_str()
        self.server = Server(command(policy, options), environment(options))
        try:
            self.server.wait()
            self.blocks = int(self.server.load()["max_total_num_tokens"]) // options.block_size
            pool = GiB * self.server.metrics("sglang:kv_cache_memory_usage_gb")
        except EngineError:
            self.server.stop()
            raise
        except BaseException:
            self.close()
            raise
        beside = pages * rows * of_token // 2  # a row is a key, half a token
        self.block_bytes = round(pool / (self.blocks + 1)) + beside  # one page takes the padding
        self.requests = 0

    def run(
        self, requests: Sequence[Request], finished: Callable[[Reply], object] | None = None
    ) -> Wave:
        """All requests stay until each has decoded a little, so that what they hold together is
        seen: the first would otherwise be gone before the last is prefilled.
        """
        check_lengths(requests, self.options.max_model_len - SPARED)
        before, started = self._counted(), time.monotonic()
        running = self._named(requests, started)
        replies: dict[str, Reply] = {}
        with Meter(self.server, self.options.block_size, len(running)) as meter:
            for event in self.server.stream(self._body(running)):
                now, state = time.monotonic(), running[event["meta_info"]["id"]]
                self._see(state, event, now)
                if state.done and state.request.key not in replies:
                    reply = replies[state.request.key] = state.reply(self.tokenizer)
                    if finished is not None:
                        finished(reply)
                if all(state.steps >= SETTLED for state in running.values()):
                    meter.open(all_there=not any(state.gone for state in running.values()))
                if meter.has_seen:
                    self._dismiss(running)
        after = self._counted()
        queries, cached, read = (b - a for a, b in zip(before, after, strict=True))
        return Wave(
            replies=[replies[request.key] for request in requests],
            seconds=time.monotonic() - started,
            peak_blocks=meter.peak,
            held_blocks=meter.held,
            queries=queries,
            cached=cached,
            read=read,
        )

    def forget(self) -> None:
        self.server.flush()

    def close(self) -> None:
        self.server.stop()
        self.server.process.log.unlink(missing_ok=True)

    def _named(self, requests: Sequence[Request], started: float) -> dict[str, Running]:
        first = self.requests
        self.requests += len(requests)
        return {
            f"kvplug-{number}": Running(request, started, self.ends)
            for number, request in enumerate(requests, start=first)
        }

    def _body(self, running: dict[str, Running]) -> dict[str, Any]:
        """One request of all prompts."""
        requests = [state.request for state in running.values()]
        steps = (
            sum(len(request.prompt) for request in requests) // self.options.max_num_batched_tokens
        )
        return {
            "rid": list(running),
            "input_ids": [request.prompt for request in requests],
            "sampling_params": [self._sampling(request, STAY + steps) for request in requests],
            "custom_logit_processor": [self.processor if r.forced else None for r in requests],
            "stream": True,
        }

    def _sampling(self, request: Request, stay: int) -> dict[str, Any]:
        """Greedy. What ends a request is judged here: a forced token ends nothing."""
        room = self.options.max_model_len - SPARED - len(request.prompt)
        parameters: dict[str, Any] = {
            "temperature": 0,
            "max_new_tokens": min(len(request.forced) + request.new_tokens + stay, room),
            "ignore_eos": True,
        }
        if request.forced:
            parameters["custom_params"] = {FORCED: list(request.forced), SCORED: request.scored}
        if request.policy is not None:
            parameters.setdefault("custom_params", {})["kvplug"] = request.policy
        return parameters

    def _see(self, state: Running, event: dict[str, Any], now: float) -> None:
        told = event["meta_info"]
        if not state.steps:  # a retracted request would later find its own
            state.cached = told["cached_tokens"]
        state.scores += told.get(SCORES) or []
        state.add(event["output_ids"], now, self.tokenizer)
        why = told["finish_reason"]
        if why is None:
            return
        state.gone = True
        if not state.done:
            wanted = len(state.request.forced) + state.request.new_tokens
            raise self.server.process.failure(
                f"SGLang ended {state.request.key} after {len(state.tokens)} of {wanted} tokens: "
                f"{why.get('message') or why['type']}"
            )

    def _dismiss(self, running: dict[str, Running]) -> None:
        for name, state in running.items():
            if state.done and not state.gone and not state.dismissed:
                state.dismissed = True
                self.server.abort(name)

    def _counted(self) -> tuple[float, float, float]:
        """Decode queries, tokens behind them and tokens read, since the server's start."""
        queries, cached, read = self.server.counters(COUNTERS)
        return queries, cached, read


@dataclass(frozen=True)
class Sample:
    """The pool between two steps."""

    at: float
    """Of the clock that server and client share."""
    requests: int
    """That decode."""
    blocks: int
    """That they hold; what the prefix cache could give up is not counted."""


class Meter:
    """What a wave holds, sampled from ``/v1/loads``, which the scheduler writes at every step."""

    def __init__(self, server: Server, block_size: int, requests: int) -> None:
        self.server = server
        self.block_size = block_size
        self.requests = requests
        self.samples: list[Sample] = []
        self.opened: float | None = None
        """When all requests had settled."""
        self.closed = False
        """Whether one had gone by then."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def open(self, all_there: bool) -> None:
        if self.opened is None:
            self.opened, self.closed = time.time(), not all_there

    @property
    def settled(self) -> list[Sample]:
        """Of all requests together, once each has settled."""
        if self.opened is None or self.closed:
            return []
        return [s for s in self.samples if s.at >= self.opened and s.requests == self.requests]

    @property
    def has_seen(self) -> bool:
        """Whether nobody needs to stay any longer."""
        return self.opened is not None and (self.closed or bool(self.settled))

    @property
    def peak(self) -> int:
        return max((sample.blocks for sample in self.samples), default=0)

    @property
    def held(self) -> int:
        settled = self.settled
        return round(median(s.blocks for s in settled)) if settled else self.peak

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            with contextlib.suppress(EngineError):  # the stream will say so
                load = self.server.load()
                sample = Sample(
                    at=load["timestamp"],
                    requests=load["num_running_reqs"],
                    blocks=-(-load["num_used_tokens"] // self.block_size),
                )
                if self.samples[-1:] != [sample]:
                    self.samples.append(sample)


class Server:
    """How a server is asked. Raises EngineError with its last words."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        port = process.free_port()
        whole = [*arguments, "--host", "127.0.0.1", "--port", str(port)]
        file, name = tempfile.mkstemp(prefix="kvplug-sglang-", suffix=".log")
        os.close(file)
        self.process = process.Server("SGLang", whole, environment, Path(name))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def wait(self) -> None:
        """Until it answers."""
        self.process.wait(self._answers, START_SECONDS)

    def stop(self) -> None:
        self.process.stop()
        self.client.close()

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of ``/generate`` as they come."""
        with (
            self._asking(),
            self.client.stream("POST", "/generate", json=body, timeout=None) as reply,
        ):
            if reply.is_error:
                reply.read()
                raise EngineError(f"SGLang refused a request: {reply.text[:500]}")
            for line in reply.iter_lines():
                data = line.removeprefix("data: ")
                if data in ("", "[DONE]"):
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise EngineError(f"SGLang refused a request: {event['error']['message']}")
                yield event

    def abort(self, name: str) -> None:
        with self._asking():
            self.client.post("/abort_request", json={"rid": name}).raise_for_status()

    def flush(self) -> None:
        """SGLang refuses while its last batch is still counted; it waits itself, if asked to."""
        with self._asking():
            reply = self.client.post(
                "/flush_cache", params={"timeout": FLUSH_SECONDS}, timeout=2 * FLUSH_SECONDS
            )
        if reply.is_error:
            raise EngineError(
                f"SGLang could not empty its prefix cache: {reply.text.strip()}; no request may "
                "be running"
            )

    def load(self) -> dict[str, Any]:
        """What the scheduler wrote at its last step."""
        with self._asking():
            return self._loads()[0]

    def _loads(self) -> list[dict[str, Any]]:
        reply = self.client.get("/v1/loads", params={"include": "core"}).raise_for_status()
        loads: list[dict[str, Any]] = reply.json()["loads"]
        return loads

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/health").is_success and bool(self._loads())
        return False

    def metrics(self, name: str) -> float:
        """One number of ``/metrics``, summed over its labels."""
        return self.counters([name])[0]

    def counters(self, names: Sequence[str]) -> list[float]:
        """0 for what was never counted."""
        from prometheus_client.parser import text_string_to_metric_families

        with self._asking():
            text = self.client.get("/metrics/", follow_redirects=True).raise_for_status().text
        totals = dict.fromkeys(names, 0.0)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in totals:
                    totals[sample.name] += sample.value
        return list(totals.values())

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise self.process.request_failure(error) from error


def command(policy: str, options: EngineOptions) -> list[str]:
    """What starts a server, its address aside."""
    model, size = Path(options.model), options.block_size
    dtype = served_dtype(model, options.dtype)
    tokens = options.kv_cache_mib * MiB // token_bytes(model, dtype) // size * size
    line = json.dumps(options.offer(policy)) if options.allow else policy
    eager = ("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph")
    return [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", options.model),
        *("--attention-backend", "kvplug", "--kvplug-policy", line),
        *("--dtype", dtype, "--random-seed", "0"),
        *("--page-size", str(size), "--max-total-tokens", str(tokens)),
        *("--context-length", str(options.max_model_len)),
        *("--max-running-requests", str(options.max_num_seqs)),
        *("--chunked-prefill-size", str(options.max_num_batched_tokens)),
        *("--nccl-port", str(process.free_port())),
        *("--enable-metrics", "--load-snapshot-publish-interval", "1"),
        *("--enable-custom-logit-processor", "--incremental-streaming-output"),
        *("--skip-tokenizer-init", "--skip-server-warmup", "--sleep-on-idle"),
        *(() if torch.cuda.is_available() else ("--device", "cpu")),
        *(eager if options.enforce_eager else ()),
    ]


def environment(options: EngineOptions) -> dict[str, str]:
    """Of the server's processes."""
    ours = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if not torch.cuda.is_available():
        ours["SGLANG_USE_CPU_ENGINE"] = "1"
    theirs = {
        name: value
        for name, value in os.environ.items()
        if name not in ("KVPLUG_POLICY", "PROMETHEUS_MULTIPROC_DIR")
    }
    return theirs | ours
