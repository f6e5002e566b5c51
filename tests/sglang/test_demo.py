"""The demo with whole SGLang servers, in a small size: every number comes from the engine."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

import pytest
from rich.console import Console

from kvplug_evals.demo.conversation import CLIENTS, DOCUMENTS, TURNS, Sizes
from kvplug_evals.demo.session import run_demo
from kvplug_evals.served.sglang import SGLang

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SIZES = Sizes(characters=1500, document_characters=1200, document_tokens=8)
POLICY = "snapkv(budget=96, window=32) + quest(budget=64, dense_layers=0)"


@dataclass(frozen=True, kw_only=True)
class Small(SGLang):
    chunk: int = 256
    kv_cache_mib: int = 13
    dtype: str = "float32"
    """Not bfloat16, which a CPU without its instructions is eight times slower at."""


def test_the_demo_serves_and_measures_sglang(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with (tmp_path / "console.txt").open("w") as said:
        console = Console(file=said, width=100)
        run_demo([POLICY], Small(model=smollm2), tmp_path, console, sizes=SIZES)
    found = json.loads((tmp_path / "demo.json").read_text())
    dense, planned = found["policies"]
    assert [dense["policy"], planned["policy"]] == ["dense", POLICY]
    assert found["machine"]["sglang"].startswith("0.5.")
    for row in (dense, planned):
        assert [len(turn["replies"]) for turn in row["turns"]] == [CLIENTS] * TURNS
        for turn in row["turns"][1:]:
            assert all(reply["cached_tokens"] >= 256 for reply in turn["replies"])
        assert all(turn["queries"] == CLIENTS * 23 for turn in row["turns"])
        assert 0 < row["blocks_held_peak"] <= row["pool"]
    for turn in dense["turns"]:
        assert turn["read"] == turn["cached"]
    assert planned["tokens_read_per_step"] < 0.3 * dense["tokens_read_per_step"]
    assert dense["documents_at_once"] < planned["documents_at_once"] <= DOCUMENTS
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "SGLang 0.5." in (tmp_path / "console.txt").read_text()
