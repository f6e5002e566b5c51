"""Times of a call under CUDA graph replay, each from a cold L2 cache; on a CPU by the clock."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvplug_kernels.decode_shapes import DecodeInputs, DecodeShape, decode_inputs, serving_shapes

FLUSHED_BYTES = 256 << 20  # several times the L2 of any GPU we know
SAMPLES = 41


@dataclass(frozen=True)
class Case:
    """A call and the bytes it cannot avoid to move."""

    name: str
    call: Callable[[], Tensor | tuple[Tensor, ...] | None]
    bytes: int


@dataclass(frozen=True)
class Timing:
    name: str
    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    gb_per_s: float


def measure(case: Case, samples: int = SAMPLES) -> Timing:
    times = replays(case.call, samples) if torch.cuda.is_available() else calls(case.call, samples)
    fifths = statistics.quantiles(times, n=5)
    median = statistics.median(times)
    return Timing(
        name=case.name,
        median_us=median,
        p20_us=fifths[0],
        p80_us=fifths[-1],
        samples=samples,
        gb_per_s=case.bytes / median * 1e-3,
    )


def replays(call: Callable[[], object], samples: int) -> list[float]:
    """Microseconds of each replay of a graph that holds one call."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    events = [(timing_event(), timing_event()) for _ in range(samples)]
    graph.replay()
    for start, end in events:
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def calls(call: Callable[[], object], samples: int) -> list[float]:
    call()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def copy_case(device: str, size: int) -> Case:
    """What the memory can do: a copy, read and write counted."""
    source = torch.empty(size, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    return Case("copy", lambda: target.copy_(source), 2 * size)


def describe(shape: DecodeShape) -> str:
    return " ".join(f"{name}={length}" for name, length in asdict(shape).items())


def print_case(build: Callable[[DecodeInputs], Case]) -> None:
    """The table of one op's bench.py."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was run on a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, CUDA graph, cold L2")
    print(f"copy {measure(copy_case('cuda', 1 << 30)).gb_per_s:.0f} GB/s")
    for shape in serving_shapes():
        timing = measure(build(decode_inputs(shape, "cuda", torch.bfloat16)))
        spread = f"{timing.p20_us:.1f} to {timing.p80_us:.1f}"
        print(
            f"{timing.name:13} {describe(shape):44} {timing.median_us:8.1f} us ({spread}) "
            f"{timing.gb_per_s:6.0f} GB/s",
            flush=True,
        )
