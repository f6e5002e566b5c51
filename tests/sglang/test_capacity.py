"""What a policy adds to a page comes off SGLang's own token count, where memory sizes its pool."""

from __future__ import annotations

import logging
import re

import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

GiB = 1 << 30
FREE, FRACTION = 4 * GiB, 0.03
BUDGET = int((4.0 - 4.0 * (1 - FRACTION)) * GiB)
"""Bytes that --mem-fraction-static leaves for the cache."""
TOKEN = 2 * 2 * 2 * 64 * 4
"""Two layers, keys and values, two heads of 64, fp32."""


@pytest.fixture
def sized(engine, random_llama, monkeypatch, caplog):
    """A server on a machine with 4 GiB to spare; the real one's free memory moves all the time."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=FREE))

    def start(policy, page_size):
        """-> tokens in the start-up line, bytes of the cache, bytes of the digests"""
        caplog.clear()
        caplog.set_level(logging.INFO, logger="sglang.srt.managers.scheduler")
        options = {"max_total_tokens": None, "mem_fraction_static": FRACTION}
        with engine(random_llama(), policy, page_size=page_size, **options) as server:
            backend = server.backend
            digests = getattr(backend, "digests", None)
            tokens = server.scheduler.max_total_num_tokens
            said = re.search(r"max_total_num_tokens=(\d+)", caplog.text)
            assert said is not None
            assert int(said[1]) == tokens
            rows = 0 if digests is None else digests.rows.nbytes
            return tokens, sum(backend.token_to_kv_pool.get_kv_size_bytes()), rows

    return start


@pytest.mark.parametrize("page_size", [16, 32])
def test_digests_are_part_of_the_memory_that_is_sized(sized, page_size):
    stock = sized(None, page_size)
    assert stock == (BUDGET // TOKEN // page_size * page_size, stock[1], 0)
    assert sized("snapkv(budget=64)", page_size) == stock, "what compresses prompts adds nothing"

    tokens, cache, digests = sized("quest(budget=64)", page_size)
    token = TOKEN + TOKEN // page_size  # two keys for the keys and values of a page
    assert tokens == BUDGET // token // page_size * page_size < stock[0]
    padding = page_size * token  # SGLang's own page, beside the pool it sizes
    assert cache + digests - padding == tokens * token
    assert BUDGET - padding < tokens * token <= BUDGET


def test_a_selection_that_requests_may_choose_has_its_digests(sized):
    offer = '{"policy": "dense", "allow": ["quest"], "max_budget": 128}'
    assert sized(offer, 32) == sized("quest(budget=64)", 32)
