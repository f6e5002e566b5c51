"""The start-up lines of docs/recipes.md are those that a server prints."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvplug import Planner, digest_bytes, read_offer
from kvplug_vllm.announce import describe
from kvplug_vllm.cache import DigestedSpec

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
RECIPES = re.findall(
    r"^    (vllm serve (?:.*\\\n)*.*)\n\n    (kvplug: .*)$", PAGE.read_text(), re.M
)


def test_recipes_are_found():
    assert len(RECIPES) == 6


@pytest.mark.parametrize("command, printed", RECIPES)
def test_a_recipe_prints_its_line(command, printed):
    words = shlex.split(command.replace("\\\n", " "))
    value = dict(itertools.pairwise(words))
    offer = read_offer(json.loads(value["--additional-config"])["kvplug"], environ={})
    size, longest = int(value["--block-size"]), int(value["--max-model-len"])
    shape = {"block_size": size, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}
    pages, rows = offer.digest_rows(size, 2)
    spec = FullAttentionSpec(**shape)
    if extra := digest_bytes(pages * rows, 8, 128, 2):
        padded = spec.page_size_bytes + extra
        spec = DigestedSpec(**shape, page_size_padded=padded, digest_bytes=extra)
    steps = 1 if "--no-async-scheduling" in words else 2
    config = SimpleNamespace(
        max_in_flight_tokens=steps * int(value.get("--max-num-batched-tokens", 8192))
    )
    planner = Planner(offer.settings, size)
    assert describe(planner, spec, longest, config) == printed
