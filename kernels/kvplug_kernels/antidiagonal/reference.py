"""Plain torch in fp32, and what a CPU runs: a group's queries in reverse are a row of stride * D
numbers, a group's keys in order another, and the blocks of one request share a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug_kernels.fp8 import bits

LOGIT_BYTES = 4 << 20  # of one product: the more rows the faster, while they stay in the caches


@dataclass(frozen=True)
class Block:
    """Of at least one query, which sees at least one key."""

    row: int  # of the page table
    first: int  # row of its first query
    start: int  # position of that query
    stop: int  # position behind its last query
    keys: int  # that it sees

    def groups(self, stride: int) -> range:
        return range(self.start // stride, -(-self.stop // stride))


def antidiagonal(
    query: Tensor,
    bounds: Tensor,
    start: Tensor,
    keys: Tensor,
    page_table: Tensor,
    pages: Tensor,
    stride: int,
    scale: float,
) -> Tensor:
    (n, P), (S, H), G = page_table.shape, keys.shape[1:3], query.shape[2]
    out = torch.zeros(n, H, P, device=query.device, dtype=torch.float32)
    for run in runs_of(blocks_of(bounds, start, pages, S), page_table, S, stride):
        last = run[-1]
        ids = page_table[last.row, : -(-last.keys // S)]
        for h in range(H):
            k = key_rows(keys[:, :, h], ids, last.keys, stride)  # [J, stride * D]
            for part in parts_of(run, stride, LOGIT_BYTES // (4 * G * len(k))):
                q = query_rows(query[:, h], part, stride)  # [groups * G, stride * D]
                shares = group_shares(q * (scale / stride), k, part, stride).view(-1, G, len(k))
                each = shares.split([len(block.groups(stride)) for block in part])
                for block, share in zip(part, each, strict=True):
                    page = share.mean((0, 1)).view(-1, S // stride).sum(1)
                    out[block.row, h, : len(page)] = page
    return out


def blocks_of(bounds: Tensor, start: Tensor, pages: Tensor, S: int) -> list[Block]:
    rows, blocks = bounds.tolist(), []
    for row, (begin, count) in enumerate(zip(start.tolist(), pages.tolist(), strict=True)):
        stop = begin + rows[row + 1] - rows[row]
        block = Block(row, rows[row], begin, stop, min(count * S, stop))
        if begin < stop and block.keys > 0:
            blocks.append(block)
    return blocks


def runs_of(blocks: list[Block], page_table: Tensor, S: int, stride: int) -> Iterator[list[Block]]:
    """Blocks that follow each other and see the keys of the last of them, or the first of those
    in whole groups."""
    run: list[Block] = []
    for block in blocks:
        if run:
            before = run[-1]
            tables = page_table[[before.row, block.row], : -(-before.keys // S)]
            whole = before.keys % stride == 0 or before.keys == block.keys
            if not (whole and before.keys <= block.keys and torch.equal(*tables)):
                yield run
                run = []
        run.append(block)
    if run:
        yield run


def parts_of(run: list[Block], stride: int, groups: int) -> Iterator[list[Block]]:
    """Of so many groups in all, or one block."""
    part: list[Block] = []
    for block in run:
        if part and sum(len(each.groups(stride)) for each in (*part, block)) > groups:
            yield part
            part = []
        part.append(block)
    yield part


def key_rows(keys: Tensor, ids: Tensor, count: int, stride: int) -> Tensor:
    """The groups of the first keys of some pages. keys [N, S, D] -> [J, stride * D] fp32"""
    read = bits(keys).index_select(0, ids).view(keys.dtype).float()  # [pages, S, D]
    read.view(-1, keys.shape[2])[count:] = 0.0
    return read.view(-1, stride * keys.shape[2])


def query_rows(query: Tensor, part: list[Block], stride: int) -> Tensor:
    """The groups of some blocks, last query first. query [T, G, D] -> [groups * G, stride * D]"""
    groups = [block.groups(stride) for block in part]
    rows = query.new_zeros(sum(map(len, groups)) * stride, *query.shape[1:], dtype=torch.float32)
    each = rows.split([len(of) * stride for of in groups])
    for block, of, own in zip(part, groups, each, strict=True):
        count, at = block.stop - block.start, block.start - of.start * stride
        own[at : at + count] = query[block.first : block.first + count]
    return (
        rows.unflatten(0, (-1, stride))
        .flip(1)
        .transpose(1, 2)
        .reshape(-1, stride * query.shape[2])
    )


def group_shares(q: Tensor, k: Tensor, part: list[Block], stride: int) -> Tensor:
    """softmax of q k^T over the keys' groups that a group of queries sees. -> [groups * G, J]"""
    ends = [min(i + 1, -(-block.keys // stride)) for block in part for i in block.groups(stride)]
    end = torch.tensor(ends, device=q.device).repeat_interleave(len(q) // len(ends))
    logits = q @ k.T
    column = torch.arange(min(ends), len(k), device=q.device)
    logits[:, min(ends) :].masked_fill_(column >= end[:, None], float("-inf"))
    return logits.softmax(1)
