"""A graph backend for SGLang's own decode graph runner: ``recorded`` in place of CUDA's graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from recorded import Graph
from recorded import capture as recording
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import decode_cuda_graph_runner as stock
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend
from sglang.srt.runtime_context import get_exec

SIZES = [4]
"""Of captured batches: fewer requests are padded."""


class RecordedGraphs(BaseCudaGraphBackend):
    def __init__(self, runner: Any) -> None:
        self.graphs: dict[Any, tuple[Graph, Any]] = {}
        self.replays = 0

    @contextlib.contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self, shape_key: Any, forward_fn: Any, capture_inputs: Any = None,
        post_warmup_hook: Any = None,
    ) -> None:  # fmt: skip
        forward_fn()
        if post_warmup_hook is not None:
            post_warmup_hook()
        graph = Graph()
        with recording(graph):
            output = forward_fn()
        self.graphs[shape_key] = graph, output

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self.graphs

    @contextlib.contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        self.replays += 1
        graph, output = self.graphs[shape_key]
        graph.replay()
        return output

    def cleanup(self) -> None:
        self.graphs.clear()


def capture(model_runner: Any, sizes: list[int] | None = None) -> RecordedGraphs:
    """Give a model runner the decode graph runner that it would have on a GPU."""

    @contextlib.contextmanager
    def no_stream(stream: Any = None) -> Iterator[Any]:
        yield SimpleNamespace(stream=None)

    decode = get_exec().graph.cuda_graph_config.decode
    sizes = sizes or SIZES
    decode.backend, decode.bs, decode.max_bs = Backend.FULL, sizes, max(sizes)
    torch.cpu.is_current_stream_capturing = lambda: False
    stock.resolve_decode_backend = RecordedGraphs
    stock.graph_capture = no_stream
    stock.get_or_create_global_graph_capture_stream = lambda: None
    model_runner.graph_shared_output = GraphSharedOutput.create_for_model_runner(model_runner)
    runner = stock.DecodeCudaGraphRunner(model_runner)
    model_runner.decode_cuda_graph_runner = runner
    return runner.backend
