"""One decode step of one layer: vLLM's CPU_ATTN against the same with a policy, pair by pair.

A step writes the new token to the cache and attends; planning, which an engine does once for all
its layers, is timed apart. Both caches are as the engine allocates them, so kvplug's has room for
digests and the stock one has not, and hold the same keys. Before every timed call other memory is
read, because an engine's weights and other layers leave nothing of this one in a core's caches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from kvplug import byte_share, choose_units, parse
from kvplug.policies.twilight import Twilight, best_pages
from kvplug_evals.bench.layer import Content, Layer, Shape, fill, page_table
from kvplug_kernels.code_logits.reference import code_logits
from kvplug_kernels.key_codes.reference import update_key_codes
from kvplug_kernels.page_bound.reference import page_bound_plain
from kvplug_kernels.sparse_decode.reference import sparse_decode
from kvplug_kernels.token_select.reference import mean_weights

EVICTED_BYTES = 64 << 20  # many times a core's own caches
WARM_UP = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a head's output, in its own norm
WRITE = {"write": "kvplug_vllm.cpu.KVPlugImpl.do_kv_cache_update"}
PARTS = {  # where a step of each policy spends its time -> the function that is timed for it
    "quest": {
        **WRITE,
        "bound": "kvplug.policies.quest.page_bound",
        "select": "kvplug.selection.page_select",
        "tables": "kvplug_vllm.attention.virtual_heads",
        "attention": "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward",
    },
    "twilight": {
        **WRITE,
        "candidates": "kvplug.policies.twilight.Twilight.candidate_pages",
        "logits": "kvplug.policies.twilight.code_logits",
        "select": "kvplug.selection.token_select",
        "attention": "kvplug_vllm.attention.sparse_decode",
    },
}


class WrongOutput(Exception):
    """The fast answer is not the answer."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(median=statistics.median(values), p20=fifths[0], p80=fifths[-1])


@dataclass(frozen=True, kw_only=True)
class Result:
    """Times in milliseconds; a ratio is stock's time by ours, of calls that stood side by side."""

    shape: Shape
    isa: str
    stock: Spread
    ours: Spread
    ratio: Spread
    best_ratio: float
    """Bytes that stock reads by bytes that a perfect selection reads."""
    parts: dict[str, Spread]
    plan_stock: Spread
    plan_ours: Spread
    stock_bytes: int
    ours_bytes: int
    errors: dict[str, float] | None
    """What the check of the output found; None where it was not made."""
    repeats: int

    @property
    def of_best(self) -> float:
        return self.ratio.median / self.best_ratio

    @property
    def loses(self) -> bool:
        return self.ratio.median < 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one decode step brings, [B, Hq, D] and [B, H, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor


class Cell:
    """Both layers of one shape, filled alike."""

    def __init__(
        self,
        shape: Shape,
        policy: str,
        *,
        shuffled: bool = True,
        clock: Callable[[], float] = perf_counter,
        check: bool = False,
    ) -> None:
        self.shape, self.clock = shape, clock
        self.random = torch.Generator().manual_seed(0)
        selector = parse(policy).selector
        assert selector is not None and selector.digest is not None, policy
        self.selector = selector
        self.page = selector.page(shape.S)
        self.digest_rows = selector.digest.rows(self.page, shape.dtype.itemsize)
        self.stock, self.ours = Layer(shape), Layer(shape, policy)
        self.table = page_table(shape, shuffled, self.random)
        last = shape.T - 1
        self.slots = self.table[:, last // shape.S].long() * shape.S + last % shape.S
        self.content = fill([self.stock, self.ours], self.table, self.random, check)
        self.evicted = torch.zeros(EVICTED_BYTES // 4)
        for layer in (self.stock, self.ours):
            layer.plan(self.table, self.slots)

    def step(self) -> Step:
        shape = self.shape
        query, key, value = (
            torch.randn(shape.B, heads, shape.D, generator=self.random).to(shape.dtype)
            for heads in (shape.Hq, shape.H, shape.H)
        )
        return Step(query=query, key=key, value=value, slots=self.slots)

    def check(self, content: Content) -> dict[str, float]:
        """The output is plain attention over the pages or tokens read, and these are those of the
        highest scores, both computed in fp32 from the keys as they were before they were paged.

        Returns what was found: the largest relative error of a head, and the largest amount by
        which one left out outbid one that was read. Raises WrongOutput.
        """
        shape = self.shape
        B, S = shape.B, self.page
        P = -(-shape.T // S)
        step, last = self.step(), content.keys.shape[1] - 1
        step = replace(step, key=content.keys[:, last], value=content.values[:, last])
        out = torch.full_like(step.query, float("nan"))
        choices = []

        def recorded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            choices.append(choose_units(*args, **kwargs))
            return choices[-1]

        with mock.patch("kvplug_vllm.attention.choose_units", recorded):
            run(self.ours, step, out)
        if len(choices) != 1:
            raise WrongOutput(f"{describe(shape)}: a step chose {len(choices)} times, wanted once")
        chosen, counts = choices[0]

        room = (0, 0, 0, 0, 0, P * S - shape.T)
        paged = (
            torch.nn.functional.pad(whole, room).view(B * P, S, shape.H, shape.D)
            for whole in (content.keys, content.values)
        )
        keys, values = paged
        lengths = torch.full((B,), shape.T, dtype=torch.int32)
        in_order = torch.arange(B * P, dtype=torch.int32).view(B, P)
        wanted = sparse_decode(
            step.query, keys, values, in_order, chosen, counts, lengths, shape.D**-0.5,
            self.selector.unit(S),
        ).float()  # fmt: skip
        error = ((out.float() - wanted).norm(dim=2) / wanted.norm(dim=2)).max().item()
        if not error <= TOLERANCE[shape.dtype]:
            raise WrongOutput(
                f"{describe(shape)}: the output is off by {error:.1e} of attention over what "
                f"it read, more than {TOLERANCE[shape.dtype]:.0e}"
            )

        scores = self.scores(step.query, keys, in_order)
        read = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, chosen.long(), True)
        lowest = scores.masked_fill(~read, float("inf")).amin(2)
        outbid = (scores.masked_fill(read, float("-inf")).amax(2) - lowest) / lowest.abs()
        short = outbid.max().item()
        wanted_units = int(self.selector.units(np.array([shape.T]), S)[0])
        if int(counts.min()) != wanted_units or not short <= 1e-2:
            raise WrongOutput(
                f"{describe(shape)}: {int(counts.min())} units were read, and one left out "
                f"outbids the lowest of them by {short:.1e} of its score"
            )
        return {"output": error, "selection": max(short, 0.0)}

    def scores(self, query: Tensor, keys: Tensor, table: Tensor) -> Tensor:
        """What each unit is chosen by, infinity where it always is. keys [N, S, H, D] in order,
        table [B, P] -> [B, H, units]"""
        (N, S, H, D), selector, T = keys.shape, self.selector, self.shape.T
        if not isinstance(selector, Twilight):
            pages = torch.full_like(table[:, 0], table.shape[1])
            kept = keys.view(len(table), -1, H, D)[:, :T]
            digests = torch.stack(extremes(kept, S), 3).view(N, H, 2, D)
            bounds = page_bound_plain(query, digests, table, pages)
            bounds[:, :, -1] = float("inf")
            return bounds
        codes = keys.new_zeros(N, H, self.digest_rows, D)
        update_key_codes(codes, keys, torch.arange(N * S), selector.bits)
        full = torch.full((len(table),), (T - 1) // S, dtype=torch.int32)
        wanted = None
        if selector.candidates is not None:
            levels = 2**selector.bits - 1
            bounds = page_bound_plain(query, codes[:, :, :2], table, full, levels)
            wanted = best_pages(bounds, full, selector.candidates)
        logits = code_logits(query, codes, table, full, S, selector.bits, wanted)
        token = torch.arange(logits.shape[2])
        newest = token >= (T - 1) // S * S
        weights = mean_weights(logits * D**-0.5, H, newest.expand(len(table), -1))
        always = (newest & (token < T)) | (token < selector.sinks)
        return weights.masked_fill(always, float("inf"))

    def _rows_read(self) -> float:
        """Of a page's digest, mean over the pages."""
        selector, rows = self.selector, self.digest_rows
        if isinstance(selector, Twilight) and selector.candidates is not None:
            return 2 + (rows - 2) * selector.candidates  # of the others lo and step alone
        return rows

    def measure(self, repeats: int) -> Result:
        errors = None
        if self.content is not None:
            errors, self.content = self.check(self.content), None
        stock, ours = self._pairs(repeats)
        with Stopwatch(PARTS[self.selector.name], self.clock) as watch:
            self._pairs(repeats, watch)
        shape = self.shape
        share = byte_share(shape.T, self.selector.budget, self.page, self._rows_read())
        return Result(
            shape=shape,
            isa=self.stock.attention.isa,
            stock=Spread.of(stock),
            ours=Spread.of(ours),
            ratio=Spread.of([a / b for a, b in zip(stock, ours, strict=True)]),
            best_ratio=1 / share,
            parts={name: Spread.of(times[WARM_UP:]) for name, times in watch.laps.items()},
            plan_stock=self._planning(self.stock, repeats),
            plan_ours=self._planning(self.ours, repeats),
            stock_bytes=self.stock.bytes,
            ours_bytes=self.ours.bytes,
            errors=errors,
            repeats=repeats,
        )

    def _pairs(
        self, repeats: int, watch: Stopwatch | None = None
    ) -> tuple[list[float], list[float]]:
        """Milliseconds of both, one after the other, on the same step."""
        stock: list[float] = []
        ours: list[float] = []
        for _ in range(WARM_UP + repeats):
            step = self.step()
            out = torch.empty_like(step.query)
            stock.append(self._cold(lambda: run(self.stock, step, out)))  # noqa: B023
            if watch is not None:
                watch.start()
            ours.append(self._cold(lambda: run(self.ours, step, out)))  # noqa: B023
            if watch is not None:
                watch.stop()
        return stock[WARM_UP:], ours[WARM_UP:]

    def _planning(self, layer: Layer, repeats: int) -> Spread:
        times = [self._cold(lambda: layer.plan(self.table, self.slots)) for _ in range(repeats)]
        return Spread.of(times)

    def _cold(self, call: Callable[[], None]) -> float:
        self.evicted.sum()  # reads: what is written would have to leave the caches first
        began = self.clock()
        call()
        return (self.clock() - began) * 1e3


class Stopwatch:
    """Times functions where others look them up, from start() to stop(), summed for each lap."""

    def __init__(self, functions: Mapping[str, str], clock: Callable[[], float]) -> None:
        self.laps: dict[str, list[float]] = {name: [] for name in functions}
        self.functions, self.clock = functions, clock
        self.running = False
        self.patches = ExitStack()

    def __enter__(self) -> Stopwatch:
        for name, path in self.functions.items():
            self.patches.enter_context(mock.patch(path, self._timed(name, resolve_name(path))))
        return self

    def __exit__(self, *error: object) -> None:
        self.patches.close()

    def start(self) -> None:
        self.running = True
        for times in self.laps.values():
            times.append(0.0)

    def stop(self) -> None:
        self.running = False

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return function(*args, **kwargs)
            began = self.clock()
            result = function(*args, **kwargs)
            self.laps[name][-1] += (self.clock() - began) * 1e3
            return result

        return call


def run(layer: Layer, step: Step, out: Tensor) -> None:
    layer.write(step.key, step.value, step.slots)
    layer.attend(step.query, out)


def extremes(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """keys [B, T, H, D] -> minimum and maximum of each page, [B, P, H, D]"""
    pages = [page.aminmax(dim=1) for page in torch.split(keys, page_size, 1)]
    low, high = (torch.stack(list(side), 1) for side in zip(*pages, strict=True))
    return low, high


def describe(shape: Shape) -> str:
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{shape.Hq}/{shape.H} heads of {shape.D}, {dtype}, B={shape.B}, {shape.T:,} tokens"
