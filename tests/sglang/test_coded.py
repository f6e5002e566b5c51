"""Pages kept in a format: answers are those of a plain Llama that reads what the format says.

Page size 32, chunks of 96 tokens. Codes of every page and what lies in every open page are filled
with garbage when their owner leaves, so that nothing stale can be read unnoticed.
"""

from __future__ import annotations

import json

import psutil
import pytest
import torch

from kvplug import parse
from tests.plain_llama import Coded

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S, GiB = 32, 1 << 30
OPTIONS = {"page_size": S, "chunked_prefill_size": 96, "max_running_requests": 8}
POISON = 0xFF
"""A byte of NaN in every dtype, and of the highest codes."""


@pytest.fixture(scope="module")
def agreed(random_llama):
    """Tokens of each answer before the first that the plain model would not have said."""

    def count(policy, prompts, answers):
        plain = Coded(random_llama(), policy, S)
        return [plain.agrees(*each) for each in zip(prompts, answers, strict=True)]

    return count


def poison(planned, monkeypatch):
    """What leaves a request becomes garbage: slots that return to the allocator, and rows."""
    backend, allocator = planned.backend, planned.allocator
    rows = planned.scheduler.req_to_token_pool
    for codes in backend.token_to_kv_pool.codes:
        codes.fill_(POISON)
    backend.open.fill_(float("nan"))
    free_rows, free = rows.free_rows, allocator.free

    def without_rows(indices):
        backend.open[:, list(indices)] = float("nan")
        free_rows(indices)

    def without(slots):
        for codes in backend.token_to_kv_pool.codes:
            codes[slots.long() // S] = POISON
        free(slots)

    monkeypatch.setattr(rows, "free_rows", without_rows)
    monkeypatch.setattr(allocator, "free", without)


def settled(planned, slots=16384):
    """Nothing is held any more, in the tree or by a request."""
    from kvplug_sglang.settings import Engine

    return sum(planned.free) == slots and not Engine.serving().router.tenants


@pytest.fixture(scope="class")
def shared(engine, random_llama):
    with engine(random_llama(), TestFourBits.policy, **OPTIONS) as planned:
        yield planned


class TestFourBits:
    policy = "kivi(bits=4)"

    @pytest.fixture
    def planned(self, shared, monkeypatch):
        poison(shared, monkeypatch)
        yield shared
        assert settled(shared)
        shared.steps.clear()
        shared.forget()

    def test_ragged_chunks_found_again(self, planned, prompts, agreed):
        batch = prompts(300, 65, 33, 31, 64, 1)
        answers = planned.generate(batch, 40)
        assert agreed(self.policy, batch, answers) == [40] * len(batch)
        assert agreed("kivi(bits=2)", batch, answers) != [40] * len(batch), "any bits would do"
        turns = [prompt + answer for prompt, answer in zip(batch, answers, strict=True)]
        rids = [planned.send(turn, 8) for turn in turns]
        planned.drain()
        # Every full page behind which a token was left to compute is found.
        found = [(len(prompt) + 40 - 1) // S * S for prompt in batch]
        assert [planned.cached(rid) for rid in rids] == found
        second = [planned.output(rid) for rid in rids]
        assert agreed(self.policy, turns, second) == [8] * len(batch)

    def test_retracted_and_aborted(self, planned, prompts, agreed, monkeypatch):
        import sglang.srt.managers.scheduler as scheduling

        batch = prompts(224, 256, 240, 231, 97, seed=2)
        expected = planned.generate(batch, 80)
        assert agreed(self.policy, batch, expected) == [80] * len(batch)
        planned.forget()
        passes = []

        def abort():
            passes.append(len(passes))
            if len(passes) in (1, 4, 7, 23):
                planned.abort(doomed.pop())

        monkeypatch.setattr(scheduling, "TEST_RETRACT", True)
        monkeypatch.setattr(scheduling, "TEST_RETRACT_INTERVAL", 23)
        planned.steps.append(abort)
        doomed = [planned.send(prompt, 80) for prompt in prompts(300, 150, 97, 1, seed=3)]
        rids = [planned.send(prompt, 80) for prompt in batch]
        planned.drain()
        assert not doomed
        assert sum(planned.requests[rid].retraction_count for rid in rids) >= 3
        assert [planned.output(rid) for rid in rids] == expected


@pytest.mark.parametrize(
    "policy, packed",
    [
        ("kivi(bits=2, value_bits=8) + quest(budget=96, dense_layers=0)", 0),
        ("streaming_llm(sinks=4, window=100) + kivi(bits=4, first=1, bits_first=8)", 0),
        # At fewer bits what is coded again lies half way between two codes every so often, and the
        # last bit of a float decides (tests/vllm/test_coded.py).
        ("keydiff(budget=64, interval=20) + kivi(bits=8)", 3),
    ],
)
def test_beside_what_selects_and_what_packs(
    engine, random_llama, prompts, agreed, monkeypatch, policy, packed
):
    batch = prompts(300, 165, 233, 31)
    with engine(random_llama(), policy, **OPTIONS) as planned:
        poison(planned, monkeypatch)
        answers = planned.generate(batch, 40)
        assert agreed(policy, batch, answers) == [40] * len(batch)
        assert planned.backend.packed_prompts == packed
        assert bool(planned.backend.selected_queries) == (parse(policy).selector is not None)
        planned.forget()
        assert [planned.generate([prompt], 40)[0] for prompt in batch[:2]] == answers[:2]
        assert settled(planned)


def test_requests_choose_over_the_servers_format(
    engine, random_llama, prompts, agreed, monkeypatch
):
    batch = prompts(300, 165, 233, 31, 200, 310)
    asked = [
        None,
        "snapkv(budget=96, window=16)",
        "quest(budget=96, dense_layers=0)",
        "dense",
        "twilight(budget=0.3, bits=8, dense_layers=1)",
        "snapkv(budget=96, window=16) + twilight(budget=0.4, bits=8, dense_layers=1)",
    ]
    offer = {"policy": "kivi(bits=8)", "allow": ["twilight", "snapkv", "quest"], "max_budget": 96}
    with engine(random_llama(), json.dumps(offer), **OPTIONS) as planned:
        poison(planned, monkeypatch)
        rids = [planned.send(p, 40, line) for p, line in zip(batch, asked, strict=True)]
        planned.drain()
        assert settled(planned)
    for line, prompt, rid in zip(asked, batch, rids, strict=True):
        own = "kivi(bits=8)" if line in (None, "dense") else f"kivi(bits=8) + {line}"
        assert agreed(own, [prompt], [planned.output(rid)]) == [40], own


def test_the_engine_counts_as_many_more_tokens(engine, random_llama, monkeypatch):
    """Of a model in 16 bits, on a machine with 4 GiB to spare, 3 % of them for the cache."""
    memory, counted = psutil.virtual_memory(), {}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=4 * GiB))
    options = {"max_total_tokens": None, "mem_fraction_static": 0.03, "dtype": "bfloat16"}
    bytes_given = int((4.0 - 4.0 * 0.97) * GiB)
    mixed = "kivi(bits=2, first=1, bits_first=4)"
    for policy in ("dense", "kivi(bits=4)", "kivi(bits=2)", mixed):
        with engine(
            random_llama(dtype="bfloat16"), policy, **{**OPTIONS, **options, "page_size": 64}
        ) as planned:
            counted[policy] = planned.scheduler.max_total_num_tokens
            if policy != "dense":
                backend = planned.backend
                pool = backend.token_to_kv_pool
                page = sum(codes[0].nbytes for codes in pool.codes)
                given = sum(codes.nbytes for codes in pool.codes)
                assert sum(pool.get_kv_size_bytes()) == given
                keys = pool.head_num * pool.layouts[-1].key_bytes / 64  # that what chooses reads
                assert backend.engine.layer_bytes == (pool.slot_bytes, keys)
                taken = given - page + backend.open.nbytes  # SGLang's own page aside
                assert bytes_given - 2 * page < taken <= bytes_given
    for policy, times in (("kivi(bits=4)", 3.0), ("kivi(bits=2)", 5.0), (mixed, 4.0)):
        layouts = parse(policy).format.layouts(2, 64, 64, torch.bfloat16)
        plain, coded = (sum(getattr(x, f"{n}_bytes") for x in layouts) for n in ("plain", "page"))
        gained = counted[policy] / counted["dense"]
        assert gained >= 0.95 * plain / coded
        assert gained >= times
