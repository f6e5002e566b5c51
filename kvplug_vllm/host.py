"""Pages on the host, under the prefix cache, in a format of their own.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "HostPages",
      "spec_module_path": "kvplug_vllm.host", "format": "kivi(bits=8)",
      "cpu_bytes_to_use": 8589934592}}'

Which pages go, which come back and which make room is vLLM's own: its connector, its manager and
its hashes, under the salts of the policies. What is ours is how a page is written on the host. A
coded page has its keys and values alone: when it comes back the layer that reads it writes it as
if they had just been computed, and its digest speaks of what is read.

Copies are on the stream of the steps, so that each finds what the steps before it wrote; they do
not run beside the next one, as vLLM's own do on a GPU.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from kvplug_kernels.decode_pages import decode_pages
from kvplug_kernels.encode_pages import encode_pages
from kvplug_kernels.page_layout import PageLayout
from kvplug_vllm.announce import say
from kvplug_vllm.host_settings import FORMAT, HEADS, PLAIN, SPEC, format_of
from kvplug_vllm.settings import Engine

SCRATCH = 1 << 24
"""Bytes of plain keys and values on their way at once, or of one page where that has more."""


class Pages(ABC):
    """How the layers of each cache group write their pages in bytes."""

    device: torch.device
    at_once: int
    """Pages on their way together."""

    @abstractmethod
    def read(self, group: int, blocks: Tensor) -> Tensor:
        """blocks [n] -> [n, bytes] uint8"""

    @abstractmethod
    def write(self, group: int, blocks: Tensor, rows: Tensor) -> None:
        """The inverse: rows [n, bytes] uint8 into blocks [n]."""

    @abstractmethod
    def width(self, group: int) -> int:
        """Bytes of a page of all layers of a group."""


class PlainPages(Pages):
    """Bytes as they lie, digests included."""

    def __init__(self, caches: CanonicalKVCaches) -> None:
        self.parts = [
            [(caches.tensors[ref.tensor_idx].tensor, ref.page_size_bytes) for ref in refs]
            for refs in caches.group_data_refs
        ]
        self.device = caches.tensors[0].tensor.device
        self.at_once = max(1, SCRATCH // max(map(self.width, range(len(self.parts)))))

    def width(self, group: int) -> int:
        return sum(size for _, size in self.parts[group])

    def read(self, group: int, blocks: Tensor) -> Tensor:
        found = [cache[blocks, :size].view(torch.uint8) for cache, size in self.parts[group]]
        return torch.cat(found, 1)

    def write(self, group: int, blocks: Tensor, rows: Tensor) -> None:
        sizes = [size for _, size in self.parts[group]]
        for (cache, size), row in zip(self.parts[group], rows.split(sizes, 1), strict=True):
            cache[blocks, :size] = row.view(cache.dtype)


class CodedPages(Pages):
    """Keys and values as a format has them, through the layers that read them."""

    def __init__(self, layers: Sequence[Sequence[Any]], layouts: Sequence[PageLayout]) -> None:
        """Of each group. Raises ValueError for layers that are not as the model says."""
        self.layers, self.layouts = layers, layouts
        self.heads = layers[0][0].impl.num_kv_heads
        self.device = layers[0][0].kv_cache.device
        for layout, of_group in zip(layouts, layers, strict=True):
            wanted = (self.heads, layout.head_size, layout.page_size)
            for layer in of_group:
                impl = layer.impl
                found = (impl.num_kv_heads, impl.head_size, layer.kv_cache.shape[2])
                if found != wanted or impl.numbers is not None:
                    raise ValueError(
                        f"{SPEC}: {layer.layer_name} has KV heads, channels and tokens of a page "
                        f"{found}, and another has {wanted}: pages on the host must be alike; "
                        f'write "{FORMAT}": "{PLAIN}"'
                    )
        plain = max(layout.plain_bytes for layout in layouts) * self.heads
        self.at_once = max(1, SCRATCH // plain)

    def width(self, group: int) -> int:
        return len(self.layers[group]) * self.heads * self.layouts[group].page_bytes

    def of_layers(self, group: int, rows: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each layer, and its pages among rows [n, bytes]. [n, H, page_bytes]"""
        layers, each = self.layers[group], self.layouts[group].page_bytes
        shaped = rows.view(len(rows), len(layers), self.heads, each)
        return zip(layers, shaped.unbind(1), strict=True)

    def read(self, group: int, blocks: Tensor) -> Tensor:
        rows = torch.empty(len(blocks), self.width(group), dtype=torch.uint8, device=blocks.device)
        order = torch.arange(len(blocks), device=blocks.device)
        for layer, pages in self.of_layers(group, rows):
            keys, values = layer.impl.read_pages(layer, layer.kv_cache, blocks[:, None])
            encode_pages(pages, keys, values, order, self.layouts[group])
        return rows

    def write(self, group: int, blocks: Tensor, rows: Tensor) -> None:
        layout = self.layouts[group]
        order = torch.arange(len(blocks), device=blocks.device)
        within = torch.arange(layout.page_size, device=blocks.device)
        slots = (blocks[:, None] * layout.page_size + within).flatten()
        for layer, pages in self.of_layers(group, rows):
            keys, values = decode_pages(pages, order, layout)
            layer.impl.do_kv_cache_update(
                layer, keys.flatten(0, 1), values.flatten(0, 1), layer.kv_cache, slots
            )


class Move(NamedTuple):
    """A job that the device may still be at."""

    job: int
    size: int
    """Bytes on the host."""
    began: Any
    ended: Any


class HostWorker(OffloadingWorker):
    def __init__(self, pages: Pages, rows: int, row_bytes: int, blocks_per_chunk: int) -> None:
        self.pages, self.blocks_per_chunk = pages, blocks_per_chunk
        self.host = torch.empty(rows, row_bytes, dtype=torch.uint8, pin_memory=PIN_MEMORY)
        self._moves: deque[Move] = deque()

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        began, size = moment(self.pages.device), 0
        for group, blocks, rows in self._some(src_spec, dst_spec):
            coded = self.pages.read(group, blocks)
            for row, page in zip(rows, coded, strict=True):
                self.host[row, : len(page)].copy_(page, non_blocking=True)
            size += coded.numel()
        self._moves.append(Move(job_id, size, began, moment(self.pages.device)))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        began, size, device = moment(self.pages.device), 0, self.pages.device
        for group, blocks, rows in self._some(dst_spec, src_spec):
            width = self.pages.width(group)
            coded = torch.empty(len(rows), width, dtype=torch.uint8, device=device)
            for row, page in zip(rows, coded, strict=True):
                page.copy_(self.host[row, :width], non_blocking=True)
            self.pages.write(group, blocks, coded)
            size += coded.numel()
        self._moves.append(Move(job_id, size, began, moment(device)))
        return True

    def _some(self, pool: Any, host: Any) -> Iterator[tuple[int, Tensor, NDArray[np.int64]]]:
        """So many as may be on their way at once: their group, blocks and rows on the host."""
        first = chunk = 0
        for group, (count, index) in enumerate(
            zip(pool.group_sizes, pool.block_indices, strict=True)
        ):
            if not count:
                continue
            blocks = torch.from_numpy(pool.block_ids[first : first + count].astype(np.int64))
            skip = index % self.blocks_per_chunk
            chunks = -(-(count + skip) // self.blocks_per_chunk)
            ids = host.block_ids[chunk : chunk + chunks].astype(np.int64) * self.blocks_per_chunk
            rows = (ids[:, None] + np.arange(self.blocks_per_chunk)).ravel()[skip : skip + count]
            first, chunk = first + count, chunk + chunks
            blocks = blocks.to(self.pages.device, non_blocking=True)
            for begin in range(0, count, self.pages.at_once):
                some = slice(begin, begin + self.pages.at_once)
                yield group, blocks[some], rows[some]
        assert (first, chunk) == (len(pool.block_ids), len(host.block_ids))

    def get_finished(self) -> list[TransferResult]:
        done = []
        while self._moves and (isinstance(self._moves[0].ended, float) or _over(self._moves[0])):
            move = self._moves.popleft()
            done.append(TransferResult(move.job, True, move.size, seconds(move)))
        return done

    def wait(self, job_ids: set[int]) -> None:
        for move in self._moves:
            if move.job in job_ids and not isinstance(move.ended, float):
                move.ended.synchronize()

    def shutdown(self) -> None:
        self.wait({move.job for move in self._moves})
        self._moves.clear()


def moment(device: torch.device) -> Any:
    """In seconds, or where the device will be."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device=device, enable_timing=True)
    event.record()
    return event


def _over(move: Move) -> bool:
    over: bool = move.ended.query()
    return over


def seconds(move: Move) -> float:
    if isinstance(move.ended, float):
        return float(move.ended - move.began)
    return float(move.began.elapsed_time(move.ended)) / 1000


class HostPages(CPUOffloadingSpec):
    """Raises ValueError where the host's memory does not hold one page of all layers."""

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._host: HostWorker | None = None
        self.format = format_of(self.extra_config)
        row = config.worker_kv_bytes_per_block
        self.layouts: list[PageLayout] = []
        if self.format is not None:
            heads, head_size = self.extra_config[HEADS]
            dtype = getattr(torch, config.model.dtype)
            self.layouts = [
                self.format.layout(group.tokens_per_block, head_size, dtype)
                for group in config.groups
            ]
            row = max(
                len(group.layer_names) * heads * layout.page_bytes
                for group, layout in zip(config.groups, self.layouts, strict=True)
            )
        self.row_bytes = self.cpu_page_size_per_worker = row
        self.kv_bytes_per_chunk = row * self.blocks_per_chunk
        room = int(self.extra_config["cpu_bytes_to_use"])
        self.num_chunks = room // self.kv_bytes_per_chunk if row else 0
        if row and not self.num_chunks:
            raise ValueError(
                f"kvplug: {SPEC}: cpu_bytes_to_use must hold a chunk of all layers' pages, "
                f"{self.kv_bytes_per_chunk:,} bytes, got {room:,}"
            )

    def get_worker(self, kv_caches: CanonicalKVCaches) -> HostWorker:
        if self._host is None:
            rows = self.num_chunks * self.blocks_per_chunk
            pages = PlainPages(kv_caches) if self.format is None else self._coded()
            self._host = HostWorker(pages, rows, self.row_bytes, self.blocks_per_chunk)
            self._announce(rows)
        return self._host

    def _coded(self) -> CodedPages:
        assert Engine.current is not None
        context = Engine.current.vllm_config.compilation_config.static_forward_context
        layers = [[context[name] for name in group.layer_names] for group in self.config.groups]
        return CodedPages(layers, self.layouts)

    def _announce(self, rows: int) -> None:
        assert Engine.current is not None
        plain = self.config.worker_kv_bytes_per_block
        say(
            Engine.current,
            f"kvplug: {rows * self.row_bytes / (1 << 20):,.0f} MiB of host memory hold {rows:,} "
            f"pages of {self.tokens_per_block[0]} tokens as {self.format or PLAIN}, "
            f"{plain / self.row_bytes:.2f} times as many as the pool's own bytes would.",
        )
