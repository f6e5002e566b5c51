"""What only a GPU can show of a whole engine; tools/gpu_engines.py runs these in this order.

A GPU rounds otherwise for another batch or another split, and a random model may then choose
another of two tokens that it holds for equally likely. So answers are compared up to such a tie,
and what the engines think of their tokens all along.
"""

from __future__ import annotations

import time

import pytest
import torch

pytestmark = pytest.mark.gpu
TIE = 0.03
"""Difference of log-probabilities that rounding to half precision may turn around."""

FULL = ("quest(budget=4096, dense_layers=0)", "snapkv(budget=4096)", "streaming_llm(window=4000)")
SOME = ("dense", "quest(budget=128, dense_layers=1)", "snapkv(budget=96)",
        "streaming_llm(sinks=32, window=96)")  # fmt: skip


def assert_same(stock: list, ours: list, what: str) -> int:
    """Token for token up to a tie of the stock engine. -> tokens compared"""
    compared = 0
    for row, (expected, got) in enumerate(zip(stock, ours, strict=True)):
        where = f"{what}, row {row}"
        for step, token in enumerate(expected.token_ids):
            likely, now = expected.logprobs[step], got.logprobs[step]
            if got.token_ids[step] != token:
                other = likely.get(got.token_ids[step])
                assert other is not None, f"{where}: token {step} is none of stock's likeliest"
                gap = likely[token].logprob - other.logprob
                assert gap < TIE, f"{where}: token {step} is less likely by {gap:.3f}"
                break
            change = abs(likely[token].logprob - now[token].logprob)
            assert change < TIE, f"{where}: token {step}'s log-probability is off by {change:.3f}"
            compared += 1
    total = sum(len(expected.token_ids) for expected in stock)
    assert compared > total / 2, f"{what}: ties hid all but {compared} of {total} tokens"
    return compared


def test_full_budget_equals_stock(engine, random_llama, prompts, sizes, record_property):
    model = random_llama()
    asked = prompts(300, 33, sizes.chunk + 50, 1, 64)
    with engine(model, None, graphs=False) as stock:
        expected = stock.run(asked, 16)
    for policy in FULL:
        with engine(model, policy, graphs=False) as served:
            compared = assert_same(expected, served.run(asked, 16), policy)
        record_property(f"{policy}: equal tokens", compared)


def test_replayed_batches_equal_eager(engine, random_llama, prompts, record_property):
    model, batches = random_llama(), (1, 2, 3, 5, 9)
    lengths = (300, 33, 600, 1, 64, 257, 450, 100, 37)
    asked = [prompts(*lengths[:batch], seed=batch) for batch in batches]
    for policy in SOME:
        with engine(model, policy, graphs=False) as eager:
            expected = [eager.run(batch, 12) for batch in asked]
        with engine(model, policy, graphs=True) as replayed:
            for batch, wanted in zip(asked, expected, strict=True):
                compared = assert_same(wanted, replayed.run(batch, 12), f"{policy}, {len(batch)}")
                record_property(f"{policy}, {len(batch)} requests: equal tokens", compared)


def test_long_decode_beside_chunked_prefill(engine, random_llama, prompts, sizes, record_property):
    """The first decodes and selects while the second's chunks are still being prefilled."""
    longest = sizes.long + 256
    model = random_llama(max_positions=longest)
    asked, policy = prompts(sizes.long, sizes.beside), "quest(budget=256)"
    with engine(model, policy, graphs=False, max_model_len=longest) as eager:
        expected = [eager.run([prompt], 24)[0] for prompt in asked]  # each alone
    with engine(model, policy, graphs=True, max_model_len=longest) as replayed:
        compared = assert_same(expected, replayed.run(asked, 24), policy)
    record_property("equal tokens", compared)


def test_one_token_last_chunk_keeps_its_question(engine, random_llama, prompts, sizes):
    """Such a chunk is replayed as if it were a decode, and its query is what scores the prompt."""
    model, policy = random_llama(), "snapkv(budget=96, window=8)"
    asked = prompts(sizes.chunk + 1)
    with engine(model, policy, graphs=False) as eager:
        expected = eager.run(asked, 16)
    with engine(model, policy, graphs=True) as replayed:
        assert_same(expected, replayed.run(asked, 16), policy)


def test_mixed_steps_take_no_more_memory(
    engine, random_llama, prompts, sizes, held, record_property
):
    """Of decodes beside prefill chunks, in shapes that never repeat."""
    model, policy = random_llama(), "quest(budget=128, dense_layers=0)"

    def mixed(served, first, steps):
        for step in range(first, first + steps):
            served.run(prompts(200 + 3 * step, 40 + step, 30, 300, seed=step), 3)

    with engine(model, policy, graphs=True, enable_prefix_caching=False) as served:
        mixed(served, 0, sizes.steps // 5)
        before = held()
        mixed(served, sizes.steps // 5, sizes.steps)
        more = held() - before
    record_property("bytes", more)
    assert more < 1 << 20, f"{more:,} bytes more after {sizes.steps} more batches"


def test_decode_times(engine, random_llama, prompts, sizes, record_property):
    """Milliseconds of a step under graphs, from two answers of different length; no claim."""
    shape = {"layers": sizes.layers}
    if torch.cuda.is_available():
        shape |= {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "float16"}
    longest, tokens = max(sizes.lengths) + 128, 33
    model = random_llama(max_positions=longest, **shape)
    for policy in ("dense", "quest(budget=2048)"):
        with engine(model, policy, graphs=True, max_model_len=longest) as served:
            for length in sizes.lengths:
                prompt = prompts(length)
                served.run(prompt, 1, logprobs=None)  # the prefix cache has it from now on
                seconds = []
                for count in (1, tokens):
                    began = time.perf_counter()
                    (answer,) = served.run(prompt, count, logprobs=None)
                    seconds.append(time.perf_counter() - began)
                    assert len(answer.token_ids) == count
                step = (seconds[1] - seconds[0]) / (tokens - 1) * 1e3
                record_property(f"{policy}, {length} tokens: ms a step", f"{step:.3f}")
                assert step > 0
