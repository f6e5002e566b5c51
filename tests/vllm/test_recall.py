"""Exact associative recall through the engine: does a policy find the right page?

Hops behind the first are look-ups while decoding; the first is answered by the prefill.
"""

from __future__ import annotations

import pytest
import torch

from kvplug_evals.models.recall import promised_recall, reachable, recall_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAGE, HOPS, QUESTIONS = 32, 4, 12


def hits(engine, prompt) -> torch.Tensor:
    """bool [questions, hops]: right so far. One context, asked by everyone."""
    engine.generate([prompt.tokens], 1)  # the context once, into the prefix cache
    answers = engine.generate([[*prompt.tokens, q] for q in prompt.questions], HOPS)
    return torch.tensor(answers) == torch.tensor(prompt.answers)


@pytest.mark.parametrize("tokens, pairs", [(8192, 256), (32768, 1000)])
def test_recall_is_what_each_policy_promises(engine, recall, tokens, pairs):
    prompt = recall_prompt(tokens - 64, pairs, QUESTIONS, seed=1, hops=HOPS)
    options = {
        "max_model_len": tokens,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 512 << 20,
    }
    with engine(recall, {"policy": "dense"}, **options) as planned:
        assert hits(planned, prompt).all()

    for budget in (512, 2048):
        with engine(
            recall, {"policy": f"quest(budget={budget}, dense_layers=0)"}, **options
        ) as planned:
            found = hits(planned, prompt)
            assert all(planned.selected)
        promised = promised_recall(prompt, page_size=PAGE, budget=budget)
        decoded, promise = found[:, 1:], promised[:, 1:]
        print(
            f"{tokens} tokens, quest(budget={budget}): found {decoded.float().mean():.2f}, "
            f"its bound promises {promise.float().mean():.2f}"
        )
        assert found[:, 0].all(), "the first answer comes from the prefill"
        # A miss sends the chain elsewhere: compare while the chain is right.
        alive = torch.cat([torch.ones(QUESTIONS, 1, dtype=torch.bool), decoded[:, :-1]], 1)
        alive = alive.cumprod(1).bool()
        assert (decoded == promise)[alive].all(), "found is what the bound promises, no less"
        assert promise.float().mean() > 0, "the promise says something"

    sinks, window = 32, 2048
    policy = {"policy": f"streaming_llm(sinks={sinks}, window={window})"}
    with engine(recall, policy, **options) as planned:
        found = hits(planned, prompt)
    inside = reachable(prompt, sinks=sinks, window=window)
    rounded = reachable(prompt, sinks=sinks, window=window + PAGE)  # to whole pages
    print(
        f"{tokens} tokens, {policy['policy']}: found {found.float().mean():.2f}, "
        f"inside {inside.float().mean():.2f}"
    )
    first = found[:, 0]
    assert first[inside[:, 0]].all()
    assert not first[~rounded[:, 0]].any(), "what lies outside its window is lost"
