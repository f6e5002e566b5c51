"""python -m kvplug_kernels.antidiagonal.bench: the estimate beside dense attention of the chunk.

On a CPU fp32 and as many threads as torch takes, on a GPU bf16. Runs are interleaved.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvplug_kernels.antidiagonal import antidiagonal
from kvplug_kernels.block_mean import block_mean
from kvplug_kernels.page_select import page_select

CHUNK, BLOCK, SIZE, ROUNDS = 1024, 64, 32, 5  # queries, queries, tokens of a page, runs of each


class Heads(NamedTuple):
    H: int
    G: int
    D: int


class Inputs(NamedTuple):
    """The last chunk of one prompt, in blocks."""

    query: Tensor  # [T, H, G, D]
    keys: Tensor  # [N, S, H, D]
    bounds: Tensor  # [n + 1]
    start: Tensor  # [n]
    page_table: Tensor  # [n, P]
    pages: Tensor  # [n]


def inputs(heads: Heads, tokens: int, device: str, dtype: torch.dtype) -> Inputs:
    H, G, D = heads
    torch.manual_seed(0)
    integers = {"device": device, "dtype": torch.int32}
    bounds = torch.arange(0, CHUNK + 1, BLOCK, **integers)
    start = bounds[:-1] + tokens - CHUNK
    table = torch.randperm(tokens // SIZE, device=device).int()
    return Inputs(
        query=torch.randn(CHUNK, H, G, D, device=device, dtype=dtype),
        keys=torch.randn(tokens // SIZE, 2, SIZE, H, D, device=device, dtype=dtype)[:, 0],
        bounds=bounds,
        start=start,
        page_table=table.expand(len(start), -1).contiguous(),
        pages=(start + BLOCK) // SIZE,
    )


def calls(i: Inputs) -> dict[str, Callable[[], object]]:
    T, _, G, D = i.query.shape
    keys = i.keys[i.page_table[0].long()].flatten(0, 1)  # [tokens, H, D]
    tokens = len(keys)
    k = keys.transpose(0, 1).repeat_interleave(G, 0)[None].contiguous()
    q = i.query.flatten(1, 2).transpose(0, 1)[None].contiguous()
    column = torch.arange(tokens, device=k.device)
    mask = column <= column[tokens - T :, None]
    width = i.page_table.shape[1]
    newest = torch.full_like(i.pages, BLOCK // SIZE)

    def estimate(stride: int) -> Tensor:
        return antidiagonal(
            i.query, i.bounds, i.start, i.keys, i.page_table, i.pages, stride, D**-0.5
        )

    logits = estimate(8).log()
    return {
        "dense": lambda: scaled_dot_product_attention(q, k, k, attn_mask=mask),
        "stride 8": lambda: estimate(8),
        "stride 16": lambda: estimate(16),
        "select": lambda: page_select(
            logits, i.pages, i.pages, width, top_p=0.9, sinks=4, newest=newest
        ),
        "block_mean": lambda: block_mean(i.query.flatten(1, 2), i.bounds),
    }


def interleaved(cases: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(ROUNDS + 1):
        for name, call in cases.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first compiles and warms up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}, torch {torch.__version__}, {dtype}, chunk {CHUNK}, block {BLOCK}, page {SIZE}"
    )
    shapes = [Heads(8, 4, 128)] if gpu else [Heads(3, 3, 64), Heads(2, 4, 128)]
    for heads in shapes:
        for tokens in (8192, 16384, 32768):
            medians = interleaved(calls(inputs(heads, tokens, device, dtype)))
            dense = medians.pop("dense")
            rest = ", ".join(f"{name} {each / dense:.2%}" for name, each in medians.items())
            print(f"{heads} {tokens} tokens: dense {dense:.1f} ms; of it {rest}", flush=True)


if __name__ == "__main__":
    main()
