"""Pages kept in a format: answers are those of a plain Llama that reads what the format says.

Every new block is filled with garbage when it is handed out, and every block that leaves a request
too, so that nothing stale can be read unnoticed.
"""

from __future__ import annotations

import pytest
import torch

from kvplug import parse
from tests.plain_llama import Coded
from tests.vllm.test_lifecycle import ROOMY, leave, preemptions, solo, with_room

pytestmark = [pytest.mark.engine, pytest.mark.both, pytest.mark.timeout(900)]

S = 32
MiB = 1 << 20
CHUNKS = {"max_model_len": 1024, "max_num_batched_tokens": 100, "num_gpu_blocks_override": ROOMY}
"""That end anywhere in a page."""


@pytest.fixture(scope="module")
def agreed(random_llama):
    """Tokens of each answer before the first that the plain model would not have said."""

    def count(policy, prompts, answers):
        plain = Coded(random_llama(), policy, S)
        return [plain.agrees(*each) for each in zip(prompts, answers, strict=True)]

    return count


def test_ragged_chunks_found_again_and_aborted(engine, random_llama, prompts, agreed):
    policy, batch = "kivi(bits=4)", prompts(300, 65, 33, 31, 64, 1)
    with engine(random_llama(), {"policy": policy}, **CHUNKS) as planned:
        planned.poison(freed=False)
        free, answers = planned.free_blocks, planned.generate(batch, 40)
        assert agreed(policy, batch, answers) == [40] * len(batch)
        assert agreed("kivi(bits=2)", batch, answers) != [40] * len(batch), "any bits would do"
        turns = [prompt + answer for prompt, answer in zip(batch, answers, strict=True)]
        again = planned.run(turns, 8)
        # Every full page behind which a token was left to compute is found.
        found = [(len(prompt) + 40 - 1) // S * S for prompt in batch]
        assert [out.num_cached_tokens for out in again] == found
        second = [list(out.outputs[0].token_ids) for out in again]
        assert agreed(policy, turns, second) == [8] * len(batch)
        planned.forget()
        core = planned.llm.llm_engine
        for steps in (1, 3, 6):
            from vllm import SamplingParams

            doomed = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            core.add_request("doomed", {"prompt_token_ids": batch[0]}, doomed)
            for _ in range(steps):
                core.step()
            core.abort_request(["doomed"])
            planned.forget()
            assert planned.free_blocks == free
        assert solo(planned, batch[:3], 40) == answers[:3]


@pytest.mark.parametrize(
    "policy, caching, taken",
    [
        ("kivi(bits=4)", False, 69),
        pytest.param("kivi(bits=4)", True, 69, marks=pytest.mark.cpu),
        ("kivi(bits=4, first=1, bits_first=8)", True, 80),
    ],
)
def test_preempted_and_resumed(engine, random_llama, prompts, agreed, policy, caching, taken):
    batch = prompts(224, 256, 240, 231, 97)
    with engine(
        random_llama(), {"policy": policy}, enable_prefix_caching=caching, **CHUNKS
    ) as planned:
        planned.poison(freed=not caching)
        free, expected = planned.free_blocks, with_room(planned, batch, 120)
        assert agreed(policy, batch, expected) == [120] * len(batch)
        hostages, seen = leave(planned, taken), preemptions(planned)
        assert planned.generate(batch, 120) == expected
        assert seen, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free


@pytest.mark.parametrize(
    "policy, packed",
    [
        ("kivi(bits=2, value_bits=8) + quest(budget=96, dense_layers=0)", 0),
        pytest.param(
            "kivi(bits=4) + twilight(budget=0.3, bits=4, dense_layers=1)", 0,
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            "snapkv(budget=96, window=16) + kivi(bits=8, value_bits=4, first=1, bits_first=8) + "
            "twilight(budget=0.4, bits=8, dense_layers=1)", 3, marks=pytest.mark.cpu,
        ),
        pytest.param(
            "streaming_llm(sinks=4, window=100) + kivi(bits=4)", 0, marks=pytest.mark.cpu
        ),
        # At fewer bits what is coded again lies half way between two codes every so often, and the
        # last bit of a float decides. With halves nudged up by a thousandth of a step, in the op
        # and in the plain model alike, packing at four bits agrees too.
        (
            "snapkv(budget=96, window=16) + kivi(bits=8) + twilight(budget=0.4, bits=8, "
            "dense_layers=1)", 3,
        ),
        pytest.param(
            "keydiff(budget=64, interval=20) + kivi(bits=8)", 3, marks=pytest.mark.cpu
        ),
    ],
)  # fmt: skip
def test_beside_what_selects_and_what_packs(engine, random_llama, prompts, agreed, policy, packed):
    batch = prompts(300, 165, 233, 31)
    with engine(random_llama(), {"policy": policy}, **CHUNKS) as planned:
        planned.poison(freed=False)
        answers = planned.generate(batch, 40)
        assert agreed(policy, batch, answers) == [40] * len(batch)
        impls = [layer.impl for layer in planned.layers.values() if hasattr(layer, "impl")]
        assert [impl.packed_prompts for impl in impls] == [packed] * 2
        builders = [each for each in planned.builders if hasattr(each, "offer")]
        counted = sum(sum(each.selected_queries.values()) for each in builders)
        assert bool(counted) == (parse(policy).selector is not None)
        planned.forget()
        assert solo(planned, batch[:2], 40) == answers[:2]


@pytest.mark.cpu
def test_requests_choose_over_the_servers_format(engine, random_llama, prompts, agreed):
    from vllm import SamplingParams

    batch = prompts(300, 165, 233, 31, 200)
    asked = ["", "snapkv(budget=96, window=16)", "quest(budget=96, dense_layers=0)", "dense",
             "twilight(budget=0.3, bits=8, dense_layers=1)"]  # fmt: skip
    allow = {"allow": ["twilight", "snapkv", "quest"], "max_budget": 96}
    with engine(random_llama(), {"policy": "kivi(bits=8)", **allow}, **CHUNKS) as planned:
        planned.poison(freed=False)
        parameters = [
            SamplingParams(
                temperature=0, max_tokens=40, ignore_eos=True, detokenize=False,
                extra_args={"kvplug": line} if line else None,
            )
            for line in asked
        ]  # fmt: skip
        outputs = planned.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in batch], parameters, use_tqdm=False
        )
    for line, prompt, output in zip(asked, batch, outputs, strict=True):
        own = "kivi(bits=8)" if line in ("", "dense") else f"kivi(bits=8) + {line}"
        assert agreed(own, [prompt], [list(output.outputs[0].token_ids)]) == [40]


@pytest.mark.cpu
def test_the_engine_counts_as_many_more_tokens(engine, random_llama):
    """As its own start-up line has it, of a model in 16 bits."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config as most

    counted, mixed = {}, "kivi(bits=2, first=1, bits_first=4)"
    for policy in ("dense", "kivi(bits=4)", "kivi(bits=2)", mixed):
        with engine(
            random_llama(dtype="bfloat16"), {"policy": policy}, dtype="bfloat16", block_size=64,
            max_model_len=8192, kv_cache_memory_bytes=32 * MiB,
        ) as planned:  # fmt: skip
            counted[policy] = most(planned.config, planned.scheduler.kv_cache_config)
    for policy, times in (("kivi(bits=4)", 3.0), ("kivi(bits=2)", 5.0), (mixed, 4.0)):
        layouts = parse(policy).format.layouts(2, 64, 64, torch.bfloat16)
        plain, coded = (sum(getattr(x, f"{n}_bytes") for x in layouts) for n in ("plain", "page"))
        gained = counted[policy] / counted["dense"]
        assert gained >= 0.95 * plain / coded
        assert gained >= times
