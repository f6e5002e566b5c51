"""What the Triton backend is given to read, and in how many parts: run by Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCRIPT = """
import json, sys
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from kvplug_sglang.cuda_triton import KVPlugBackend
from kvplug_sglang.step import Selected


class Made(TorchDispatchMode):
    # Memory that torch operations make, beside views of what is there.
    def __init__(self):
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs))
                 if torch.is_tensor(each)}
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if torch.is_tensor(each) and each.untyped_storage().data_ptr() not in given:
                self.bytes += each.nbytes
                self.operations += 1
        return result


def launch(self, *args, plain=GridExecutor.__call__, **kwargs):
    with _disable_current_modes():
        plain(self, *args, **kwargs)


GridExecutor.__call__ = launch


def prepared(rows, heads, group, pages, size, channels=16):
    # The arguments of a layer whose rows each read all of their pages.
    pool = torch.randn(rows * pages * size, heads, channels)
    table = torch.randperm(rows * pages).int().view(rows, pages)
    lengths = torch.full((rows,), pages * size, dtype=torch.int32)
    step = Selected(None, None, table, lengths // size, {}, lengths, size, size, pages)
    chosen = torch.arange(pages).int().expand(rows, heads, pages).contiguous()
    counts = torch.full((rows, heads), pages, dtype=torch.int32)
    backend = KVPlugBackend.__new__(KVPlugBackend)
    backend.engine = SimpleNamespace(page_size=size)
    backend.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda layer: (pool, pool))
    backend.max_kv_splits, backend.static_kv_splits, backend.device_core_count = 16, False, 132
    layer = SimpleNamespace(layer_id=0, logit_capping_method="tanh", logit_cap=0.0, scaling=1.0)
    query = torch.randn(rows, heads, group, channels)
    out = torch.empty(rows, heads * group, channels)
    return backend, (layer, query, step, chosen, counts, out, None)


def attended(*shape):
    backend, arguments = prepared(*shape)
    given = []
    backend.decode_attention_fwd = lambda *args, **kwargs: given.extend(args)
    made = Made()
    with made:
        backend.attend_heads(*arguments)
    bounds, slots, splits = given[4], given[5], given[8]
    return {
        "bytes": made.bytes, "operations": made.operations, "list": slots.nbytes,
        "bounds": bounds.tolist(), "splits": splits.tolist(),
    }


print(json.dumps([attended(*shape) for shape in json.loads(sys.argv[1])]))
"""
FEW, MANY, ONE_QUERY = (4, 8, 4, 128, 16), (64, 8, 4, 128, 16), (4, 8, 1, 128, 16)
"""Rows, KV heads, query heads to each, pages, tokens of a page."""


@pytest.fixture(scope="module")
def attended() -> dict:
    """What each shape was given to read."""
    shapes = FEW, MANY, ONE_QUERY
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(shapes)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(shapes, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_a_layer_makes_one_list_of_what_it_reads(attended):
    """Of 8 bytes a token. It was made of four such tensors, and of the same lists again."""
    found = attended[ONE_QUERY]
    assert found["list"] == 4 * 8 * 128 * 16 * 8
    assert found["bounds"] == [n * 128 * 16 for n in range(4 * 8 + 1)]
    assert found["bytes"] < 1.1 * found["list"]
    assert found["operations"] < 8


def test_sequences_of_one_head_fill_the_device(attended):
    """Four requests, 8 KV heads, 132 processors: 32 sequences are to be read in parts."""
    few, many = attended[FEW]["splits"], attended[MANY]["splits"]
    assert len(few) == 4 * 8
    assert sum(few) >= 2 * 132
    assert few == [16] * 32
    assert set(many) == {2}
