"""A CUDA graph's contract on a CPU: what was captured is replayed, and nothing else runs.

A capture records every torch operation, every Triton launch and every call of an ``opaque``
function with the very tensors that it was given. A replay repeats them over the same tensors: no
Python of a model, a backend or a policy runs, numbers are those of the capture, and what a step
wants to change must have been written into the captured tensors before. What would make a capture
fail on a GPU (waiting for a value, a shape that depends on one, memory made from the host's)
raises here too, and memory that a replay has not written yet holds poison.

It cannot show races (a replay here is synchronous: a host buffer reused too early, a second
stream), speed, or the numerics of a device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Function = TypeVar("Function", bound=Callable[..., Any])

WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__",
         "__index__", "masked_select", "unique", "from_numpy"}  # fmt: skip
DEPENDS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
UNWRITTEN = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class Graph:
    """Calls in order, each as what to do to repeat it in place."""

    replays: ClassVar[int] = 0
    """Of all graphs of the process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        Graph.replays += 1
        for again in self.calls:
            again()

    def reset(self) -> None:
        self.calls = []

    def repeats(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """What the call gave is at the same addresses after each replay."""
        given = [each for each in tree_leaves(result) if torch.is_tensor(each)]

        def again() -> None:
            made = [
                each for each in tree_leaves(function(*args, **kwargs)) if torch.is_tensor(each)
            ]
            for old, new in zip(given, made, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(again)


class _Operations(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = kwargs or {}
        if _inside_opaque:
            return function(*args, **given)
        if function.namespace == "vllm":
            return opaque(_where_it_was(function))(*args, **given)
        if function in DEPENDS:
            raise RuntimeError(f"{function} waits for the device while a graph is captured")
        result = function(*args, **given)
        if function in UNWRITTEN:
            self.graph.calls.append(functools.partial(poison, result))
            poison(result)
        else:
            self.graph.repeats(function, args, given, result)
        return result


def _where_it_was(function: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's own operators look up their layer and its metadata, at the addresses of the capture,
    in a context that a replay does not set."""
    from vllm.forward_context import get_forward_context, override_forward_context

    context = get_forward_context()

    def call(*args: Any, **kwargs: Any) -> Any:
        with override_forward_context(context):
            return function(*args, **kwargs)

    return call


class _NoWaiting(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(function, "__name__", "")
        if not _inside_opaque:
            if name in WAITS:
                raise RuntimeError(f"{name} waits for the device while a graph is captured")
            if name == "__getitem__" and any(
                torch.is_tensor(index) and index.dtype is torch.bool
                for index in tree_leaves(args[1])
            ):
                raise RuntimeError(
                    "a mask's shape depends on the device while a graph is captured"
                )
        return function(*args, **(kwargs or {}))


_capturing: Graph | None = None
_inside_opaque = 0


def poison(memory: torch.Tensor) -> None:
    if memory.is_floating_point():
        memory.fill_(float("nan"))
    elif memory.dtype in (torch.int32, torch.int64):
        memory.fill_(-(1 << 20))  # no page, no token, no length


def opaque(function: Function) -> Function:
    """A kernel that no capture looks into: recorded whole, as a launch is a node of a graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _inside_opaque
        graph = None if _inside_opaque else _capturing
        _inside_opaque += 1
        try:
            result = function(*args, **kwargs)
        finally:
            _inside_opaque -= 1
        if graph is not None:
            graph.repeats(function, args, kwargs, result)
        return result

    return call  # type: ignore[return-value]


@contextlib.contextmanager
def _launches() -> Iterator[None]:
    """Triton's interpreter runs a kernel in NumPy."""
    from triton.runtime.interpreter import GridExecutor

    plain = GridExecutor.__call__
    GridExecutor.__call__ = opaque(plain)
    try:
        yield
    finally:
        GridExecutor.__call__ = plain


@contextlib.contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """As ``torch.cuda.graph``."""
    global _capturing
    assert _capturing is None, "a capture within a capture"
    _capturing = graph
    stock = torch.from_numpy
    torch.from_numpy = _not_captured(stock)
    try:
        with _launches(), _NoWaiting(), _Operations(graph):
            yield
    finally:
        torch.from_numpy = stock
        _capturing = None


def _not_captured(function: Function) -> Function:
    """``from_numpy`` takes no tensor, so no mode sees it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _inside_opaque:
            raise RuntimeError(f"{function.__name__} makes host data while a graph is captured")
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
