"""Pages kept in a format: answers are those of a plain Llama that reads what the format says.

Every new block is filled with garbage when it is handed out, and every block that leaves a request
too, so that nothing stale can be read unnoticed.
"""

from __future__ import annotations

import pytest

from tests.plain_llama import Coded
from tests.vllm.test_lifecycle import ROOMY, leave, preemptions, solo, with_room

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32


@pytest.fixture(scope="module")
def agree(random_llama):
    """Whether each answer is what the plain model says behind its prompt."""

    def check(policy, prompts, answers, **shape):
        plain = Coded(random_llama(**shape), policy, S)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert plain.agrees(prompt, answer) == len(answer)

    return check


@pytest.mark.parametrize("policy", ["kivi(bits=4)", "kivi(bits=2, value_bits=4)"])
def test_ragged_chunked_and_found_again(engine, random_llama, prompts, agree, policy):
    """Chunks that end anywhere in a page; later turns find every full page."""
    batch = prompts(300, 65, 33, 500, 31, 64, 1)
    with engine(
        random_llama(), {"policy": policy}, max_model_len=1024, max_num_batched_tokens=100,
        num_gpu_blocks_override=ROOMY,
    ) as planned:  # fmt: skip
        planned.poison(freed=False)
        answers = planned.generate(batch, 40)
        agree(policy, batch, answers)
        again = planned.run([p + a for p, a in zip(batch, answers, strict=True)], 8)
        lengths = [len(prompt) + 40 for prompt in batch]
        assert [out.num_cached_tokens for out in again] == [(n - 1) // S * S for n in lengths]
        agree(
            policy,
            [p + a for p, a in zip(batch, answers, strict=True)],
            [list(out.outputs[0].token_ids) for out in again],
        )
        planned.forget()
        assert solo(planned, batch, 40) == answers


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_and_resumed(engine, random_llama, prompts, agree, caching):
    policy, batch = "kivi(bits=4)", prompts(224, 256, 240, 231, 97)
    with engine(
        random_llama(),
        {"policy": policy},
        enable_prefix_caching=caching,
        num_gpu_blocks_override=ROOMY,
        max_model_len=512,
        max_num_batched_tokens=100,
    ) as planned:
        planned.poison(freed=not caching)
        free, expected = planned.free_blocks, with_room(planned, batch, 120)
        agree(policy, batch, expected)
        hostages = leave(planned, 69)
        seen = preemptions(planned)
        assert planned.generate(batch, 120) == expected
        assert seen, "the pool was meant to be too small"
        planned.pool.free_blocks(hostages)
        assert planned.free_blocks == free
