"""Exact associative recall through the engine: does a policy find the right page?

Hops behind the first are look-ups while decoding; the first is answered by the prefill.
"""

from __future__ import annotations

import pytest
import torch

from kvplug_evals.models.recall import promised_recall, reachable, recall_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAGE, HOPS, QUESTIONS = 32, 4, 12


def hits(engine, prompt, policy: str | None = None) -> torch.Tensor:
    """bool [questions, hops]: right so far. One context, asked by everyone; policy: of theirs."""
    engine.generate([prompt.tokens], 1)  # the context once, into the prefix cache
    asked = {} if policy is None else {"extra_args": {"kvplug": policy}}
    answers = engine.generate([[*prompt.tokens, q] for q in prompt.questions], HOPS, **asked)
    return torch.tensor(answers) == torch.tensor(prompt.answers)


@pytest.fixture(scope="module", params=[8192, pytest.param(32768, marks=pytest.mark.cpu)])
def prompt(request):
    pairs = {8192: 256, 32768: 1000}[request.param]
    return recall_prompt(request.param - 64, pairs, QUESTIONS, seed=1, hops=HOPS)


def options(prompt) -> dict[str, int]:
    return {
        "max_model_len": len(prompt.tokens) + 64,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 512 << 20,
    }


def test_tokens_of_a_sixth_of_the_bytes_hold_every_answer(engine, recall, prompt):
    """Of a 16-bit cache's, the keys in two bits among them."""
    policy = {"policy": "twilight(budget=0.0625, dense_layers=0)"}
    with engine(recall, policy, **options(prompt)) as planned:
        assert hits(planned, prompt).all()
        assert all(planned.selected)


@pytest.fixture(scope="module")
def chosen(engine, recall, prompt):
    """Dense answers, and those of each budget of pages, by one engine over one prefix."""
    offer = {"policy": "dense", "allow": ["quest"]}
    with engine(recall, offer, **options(prompt)) as planned:
        assert hits(planned, prompt).all()
        assert not any(planned.selected)
        found = {
            budget: hits(planned, prompt, f"quest(budget={budget}, dense_layers=0)")
            for budget in (512, 2048)
        }
        assert all(planned.selected)
    return found


def test_pages_are_found_as_their_bounds_promise(chosen, prompt):
    for budget, found in chosen.items():
        promised = promised_recall(prompt, page_size=PAGE, budget=budget)
        decoded, promise = found[:, 1:], promised[:, 1:]
        print(
            f"{len(prompt.tokens)} tokens, quest(budget={budget}): found "
            f"{decoded.float().mean():.2f}, its bound promises {promise.float().mean():.2f}"
        )
        assert found[:, 0].all(), "the first answer comes from the prefill"
        # A miss sends the chain elsewhere: compare while the chain is right.
        alive = torch.cat([torch.ones(QUESTIONS, 1, dtype=torch.bool), decoded[:, :-1]], 1)
        alive = alive.cumprod(1).bool()
        assert (decoded == promise)[alive].all(), "found is what the bound promises, no less"
        assert promise.float().mean() > 0, "the promise says something"


def test_a_window_finds_what_lies_inside_it(engine, recall, prompt):
    sinks, window = 32, 2048
    policy = {"policy": f"streaming_llm(sinks={sinks}, window={window})"}
    with engine(recall, policy, **options(prompt)) as planned:
        found = hits(planned, prompt)
    inside = reachable(prompt, sinks=sinks, window=window)
    rounded = reachable(prompt, sinks=sinks, window=window + PAGE)  # to whole pages
    print(
        f"{len(prompt.tokens)} tokens, {policy['policy']}: found {found.float().mean():.2f}, "
        f"inside {inside.float().mean():.2f}"
    )
    first = found[:, 0]
    assert first[inside[:, 0]].all()
    assert not first[~rounded[:, 0]].any(), "what lies outside its window is lost"
