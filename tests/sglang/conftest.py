"""Real schedulers in this process: pool, tree, backend and test share it, so a test looks inside.

One process serves one scheduler at a time; ``sglang_server.py`` starts whole servers.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import socket
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pace import Pace

SHIMS = Path(__file__).parent / "shims"
STAND_INS = Path(__file__).parents[1] / "stand_ins"
COUNTER = re.compile(r"kvplug_(\w+)_total")

os.environ.update(
    SGLANG_USE_CPU_ENGINE="1",
    # After every step: available + evictable + protected + owned == total.
    SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY="1",
    SGLANG_CHECK_KV_PAGE_INVARIANTS="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)
sys.path[:0] = [str(SHIMS), str(Path(__file__).parent), str(STAND_INS)]


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or Triton's bindings report at the end what was never collected


def free_port() -> int:
    """Below the ports that connections are given by themselves: nobody takes it before its use."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def counters() -> dict[tuple[str, str], float]:
    """What kvplug counted in this process: (counter, policy) -> count."""
    from prometheus_client import REGISTRY

    return {
        (counter[1], sample.labels["policy"]): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if "policy" in sample.labels and (counter := COUNTER.fullmatch(sample.name))
    }


class Engine:
    """An SGLang scheduler and what a test asks of it. Greedy, fp32, page size 16, chunk 256."""

    def __init__(self, model: Path, policy: str | None, rank: int = 0, **options: Any) -> None:
        import sglang.srt.managers.scheduler as scheduling
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs, ServerArgs
        from sglang.srt.utils.watchdog import Watchdog

        load_plugins()
        # A thread that never ends, and with it the scheduler and its pool.
        scheduling.create_scheduler_watchdog = lambda *args, **kwargs: Watchdog()
        self._before = counters()
        os.environ.pop("KVPLUG_POLICY", None)
        if policy is not None:
            os.environ["KVPLUG_POLICY"] = policy
            options = {"attention_backend": "kvplug", **options}
        arguments = ServerArgs(
            model_path=str(model),
            **{
                "device": "cpu",
                "attention_backend": "torch_native",
                "dtype": "float32",
                "page_size": 16,
                "chunked_prefill_size": 256,
                "max_total_tokens": 16384,
                "max_running_requests": 16,
                "mem_fraction_static": 0.5,
                "skip_tokenizer_init": True,
                "random_seed": 0,
                "nccl_port": free_port(),  # SGLang's own choice may be another test's too
                **options,
            },
        )
        arguments.resolve_once()
        ports = PortArgs.init_new(arguments)
        ranks = scheduling.SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=rank)
        scheduling.publish(arguments, role="scheduler", ranks=ranks)
        self.scheduler = scheduling.Scheduler(arguments, ports)
        self.sent: list[Any] = []
        """What the detokenizer would have been sent."""
        sender = self.scheduler.output_streamer.send_to_detokenizer
        sender.send_output = lambda output, *args, **kwargs: self.sent.append(output)
        self.scheduler.ingest_requests = self._ingest
        self.requests: dict[str, Any] = {}
        self.steps: list[Callable[[], None]] = []
        """Called once per pass of the event loop."""
        self._inbox: list[Any] = []
        self._served = 0
        add = self.scheduler._add_request_to_queue

        def remember(request: Any, *args: Any, **kwargs: Any) -> None:
            self.requests[request.rid] = request
            add(request, *args, **kwargs)

        self.scheduler._add_request_to_queue = remember

    @property
    def backend(self) -> Any:
        """Of the layers that attend."""
        backend = self.scheduler.tp_worker.model_runner.attn_backend
        return getattr(backend, "full_attn_backend", backend)

    @property
    def tree(self) -> Any:
        return self.scheduler.tree_cache

    @property
    def allocator(self) -> Any:
        return self.scheduler.token_to_kv_pool_allocator

    @property
    def free(self) -> tuple[int, int]:
        """Slots that are available and that are evictable."""
        return self.allocator.available_size(), self.tree.evictable_size()

    def send(
        self,
        prompt: list[int],
        tokens: int = 16,
        policy: Any = None,
        session: Any = None,
        salt: str | None = None,
        fields: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> str:
        """Queue a request -> its id. fields: of SGLang's own record of it, that differ."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        if policy is not None:
            sampling["custom_params"] = {"kvplug": policy}
        parameters = SamplingParams(
            **{"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True, **sampling}
        )
        parameters.normalize(None)
        rid = f"request-{self._served}"
        self._served += 1
        told: dict[str, Any] = {
            "input_text": None, "input_embeds": None, "mm_inputs": None, "token_type_ids": None,
            "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0,
            "token_ids_logprob": None, "stream": False, "session_params": session,
            "cache_salt": salt, **(fields or {}),
        }  # fmt: skip
        self._inbox.append(
            TokenizedGenerateReqInput(
                rid=rid, input_ids=array("q", prompt), sampling_params=parameters, **told
            )
        )
        return rid

    def abort(self, rid: str) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        self._inbox.append(AbortReq(rid=rid))

    def drain(self) -> None:
        """Serve what was sent until nothing runs any more."""
        self.scheduler.gracefully_exit = False
        self.scheduler.run_event_loop()

    def _ingest(self, *args: Any, **kwargs: Any) -> list[Any]:
        for step in self.steps:
            step()
        inbox, self._inbox = self._inbox, []
        self.scheduler.process_input_requests(inbox)
        self.scheduler.gracefully_exit = not inbox and self.scheduler.is_fully_idle()
        return inbox

    def generate(
        self, prompts: list[list[int]], tokens: int = 16, policy: Any = None, **sampling: Any
    ) -> list[list[int]]:
        """All prompts at once -> output tokens each."""
        rids = [self.send(prompt, tokens, policy, **sampling) for prompt in prompts]
        self.drain()
        return [self.output(rid) for rid in rids]

    def output(self, rid: str) -> list[int]:
        return list(self.requests[rid].output_ids)

    def cached(self, rid: str) -> int:
        return self.requests[rid].cached_tokens

    def counted(self, policy: str | None = None) -> dict[str, float]:
        """What it counted under a policy, its own unless said, since it started."""
        line = str(self.backend.engine.offer.settings.policy) if policy is None else policy
        return {
            counter: value - self._before.get((counter, of), 0.0)
            for (counter, of), value in counters().items()
            if of == line
        }

    def close(self) -> None:
        """A context of sockets that are open waits for them when it is collected."""
        channel = self.scheduler.ipc_channels.recv_from_rpc
        if channel is not None:  # of the first rank
            channel.context.destroy(linger=0)

    def forget(self) -> None:
        """Empty the prefix cache."""
        self.tree.reset()
        self.scheduler.req_to_token_pool.clear()
        self.allocator.clear()


@contextlib.contextmanager
def start(model: Path, policy: str | None = None, **options: Any) -> Iterator[Engine]:
    from sglang.srt.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )
    from sglang.srt.eplb.expert_location import set_global_expert_location_metadata

    gc.freeze()  # SGLang collects garbage as it starts: a second, among all that is loaded
    Pace.starts += 1
    engine = Engine(model, policy, **options)
    try:
        yield engine
    finally:
        engine.close()
        # Or it is frozen with its pool and the threads of its groups when the next one starts.
        del engine.scheduler
        if settings := sys.modules.get("kvplug_sglang.settings"):
            settings.Engine.current = None
        destroy_model_parallel()
        destroy_distributed_environment()
        set_global_expert_location_metadata(None, allow_overwrite=True)
        gc.collect()


@pytest.fixture(scope="session")
def engine() -> Callable[..., contextlib.AbstractContextManager[Engine]]:
    """Start an engine: ``with engine(model, "dense") as stock: ...``"""
    return start
