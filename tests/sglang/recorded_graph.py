"""A graph backend for SGLang's own decode graph runner that records on a CPU what a GPU captures.

Every torch operation and every Triton launch of a captured forward is recorded with the tensors
that it took, and replayed into the tensors that it gave. What would make a capture fail on a GPU
(waiting for a value, a shape that depends on one) raises here too; what a replay would not see on
a GPU (a new tensor, a Python number) it does not see here either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import decode_cuda_graph_runner as stock
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend
from sglang.srt.runtime_context import get_exec
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__",
         "__index__", "masked_select", "unique"}  # fmt: skip
DEPENDS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
SIZES = [4]
"""Of captured batches: fewer requests are padded."""


class NoWaiting(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(function, "__name__", "")
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device while a graph is captured")
        if name == "__getitem__" and any(
            torch.is_tensor(index) and index.dtype is torch.bool for index in tree_leaves(args[1])
        ):
            raise RuntimeError("a mask's shape depends on the device while a graph is captured")
        return function(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Calls in order, each as what to do to repeat it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in DEPENDS:
            raise RuntimeError(f"{function} waits for the device while a graph is captured")
        given = kwargs or {}
        result = function(*args, **given)

        def again() -> None:
            for old, new in zip(
                tree_leaves(result), tree_leaves(function(*args, **given)), strict=True
            ):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return result


@contextlib.contextmanager
def launches(recording: Recording) -> Iterator[None]:
    """Triton's interpreter runs a kernel in NumPy: one call, as a launch is a node of a graph."""
    plain = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            plain(self, *args, **kwargs)
        recording.calls.append(lambda: plain(self, *args, **kwargs))

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = plain


class RecordedGraphs(BaseCudaGraphBackend):
    def __init__(self, runner: Any) -> None:
        self.graphs: dict[Any, tuple[Recording, Any]] = {}
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
        recording = Recording()
        with launches(recording), NoWaiting(), recording:
            output = forward_fn()
        self.graphs[shape_key] = recording, output

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self.graphs

    @contextlib.contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        self.replays += 1
        recording, output = self.graphs[shape_key]
        for again in recording.calls:
            again()
        return output

    def cleanup(self) -> None:
        self.graphs.clear()


def capture(model_runner: Any) -> RecordedGraphs:
    """Give a model runner the decode graph runner that it would have on a GPU."""

    @contextlib.contextmanager
    def no_stream(stream: Any = None) -> Iterator[Any]:
        yield SimpleNamespace(stream=None)

    decode = get_exec().graph.cuda_graph_config.decode
    decode.backend, decode.bs, decode.max_bs = Backend.FULL, SIZES, max(SIZES)
    torch.cpu.is_current_stream_capturing = lambda: False
    stock.resolve_decode_backend = RecordedGraphs
    stock.graph_capture = no_stream
    stock.get_or_create_global_graph_capture_stream = lambda: None
    model_runner.graph_shared_output = GraphSharedOutput.create_for_model_runner(model_runner)
    runner = stock.DecodeCudaGraphRunner(model_runner)
    model_runner.decode_cuda_graph_runner = runner
    return runner.backend
