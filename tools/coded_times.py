"""One layer's step over pages in codes, beside our own kernel over plain and over fp8 pages.

    make setup
    PYTHONPATH=.:kernels .venvs/vllm/bin/python tools/coded_times.py

A query of one request over its cached tokens: all, an eighth of the pages, an eighth of the
tokens. Compiled code on one thread, whose own time is taken: other work on the machine does not
lengthen it. The three take turns, so that what slows the machine slows all, and the share is the
median of their pairs'. A minute for each of the models' heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import thread_time

import torch
from torch import Tensor

from kvplug_kernels.coded_decode import coded_decode
from kvplug_kernels.decode_shapes import (
    LLAMA_8B,
    SMOLLM2_135M,
    DecodeInputs,
    DecodeShape,
    coded_cache,
    decode_inputs,
)
from kvplug_kernels.dispatch import CompiledCpu
from kvplug_kernels.sparse_decode import sparse_decode

HEADS = {"smollm2": SMOLLM2_135M, "llama-8b": LLAMA_8B}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARE = 8
"""One of so many pages or tokens is read."""


def selections(i: DecodeInputs) -> dict[str, tuple[Tensor, int]]:
    """By name, what is read of ascending units [1, H, K] and the tokens of a unit."""
    P, S, H = i.shape.pages, i.shape.S, i.shape.H

    def some(units: int) -> Tensor:
        drawn = torch.rand(1, H, units - 1).topk(units // SHARE - 1).indices.sort().values
        return torch.cat([drawn, torch.full((1, H, 1), units - 1)], 2).int()

    return {
        "all": (torch.arange(P).int().expand(1, H, P).contiguous(), S),
        "an eighth of the pages": (some(P), S),
        "an eighth of the tokens": (some(P * S), 1),
    }


def head_major(pages: Tensor) -> Tensor:
    """[N, S, H, D], a head's page together, as engines on CPUs have it."""
    return pages.transpose(1, 2).contiguous().transpose(1, 2)


def calls(
    i: DecodeInputs, bits: int, chosen: Tensor, unit: int
) -> dict[str, Callable[[], Tensor]]:
    cache, layout = coded_cache(i, bits)
    counts = torch.full((1, i.shape.H), chosen.shape[2], dtype=torch.int32)
    rest, scale = (chosen, counts, i.lengths), i.shape.D**-0.5
    newest = i.page_table[:, -1].contiguous()
    plain = head_major(i.keys), head_major(i.values)
    eight = plain[0].to(torch.float8_e4m3fn), plain[1].to(torch.float8_e4m3fn)
    return {
        "codes": lambda: coded_decode(
            i.query, cache, layout, *plain, newest, i.page_table, *rest, scale, unit
        ),
        "plain": lambda: sparse_decode(i.query, *plain, i.page_table, *rest, scale, unit),
        "fp8": lambda: sparse_decode(i.query, *eight, i.page_table, *rest, scale, unit),
    }


def shares(each: dict[str, Callable[[], Tensor]], repeats: int) -> tuple[float, float]:
    """Of the time of plain pages, and of fp8 ones."""
    taken: dict[str, list[float]] = {name: [] for name in each}
    for turn in range(repeats + 2):
        for name, call in each.items():
            began = thread_time()
            call()
            if turn > 1:  # compiled, and warm
                taken[name].append(thread_time() - began)
    return tuple(  # type: ignore[return-value]
        median(a / b for a, b in zip(taken["codes"], taken[other], strict=True))
        for other in ("plain", "fp8")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", choices=HEADS, action="append", help="repeatable; both if none")
    parser.add_argument("--dtype", choices=FLOATS, default="float32")
    parser.add_argument("--bits", type=int, action="append", help="repeatable; 8, 4 and 2 if none")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    CompiledCpu.enabled = True
    for name in given.heads or HEADS:
        shape = DecodeShape(B=1, tokens=given.tokens, S=32, **HEADS[name])
        inputs = decode_inputs(shape, "cpu", FLOATS[given.dtype])
        for read, (chosen, unit) in selections(inputs).items():
            found = (
                (bits, *shares(calls(inputs, bits, chosen, unit), given.repeats))
                for bits in given.bits or (8, 4, 2)
            )
            shown = ", ".join(f"{b} bits {plain:.2f} / {eight:.2f}" for b, plain, eight in found)
            print(f"{name}, {read}: {shown} of plain / of fp8", flush=True)


if __name__ == "__main__":
    main()
