"""Prompts of which some tokens are the embeddings of what is heard: Qwen2-Audio."""

from __future__ import annotations

import numpy as np
import pytest

from kvplug_evals.models.random_audio import AUDIO, RATE, build_random_qwen2_audio
from tests.vllm.test_architectures import impls
from tests.vllm.test_requests import parameters

pytestmark = [pytest.mark.engine, pytest.mark.both, pytest.mark.timeout(900)]

OPTIONS = {"skip_tokenizer_init": False, "max_num_batched_tokens": 128}
"""Chunks that end within what is heard."""
FORCED = [
    "quest(budget=4096, dense_layers=0)",
    "twilight(budget=1.0, dense_layers=0)",
    "streaming_llm(sinks=4, window=4096)",
    "snapkv(budget=4096)",
    "keydiff(budget=4096)",
]
"""With room for all, and everything going through them."""
CHOSEN = ("quest(budget=96, dense_layers=0)", "snapkv(budget=128)", "keydiff(budget=128)")
SMALL = [
    pytest.param(
        {"policy": "dense", "allow": ["quest", "snapkv", "keydiff"], "max_budget": 128},
        CHOSEN,
        id="chosen",
    ),
    *(
        pytest.param({"policy": line}, (None,), id=line.partition("(")[0])
        for line in ("twilight(budget=0.2, dense_layers=0)", "streaming_llm(sinks=4, window=96)")
    ),
]
"""A server, and what its requests ask for."""
TOKENS = 8
PAGE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "qwen2_audio"
    build_random_qwen2_audio(folder)
    return folder


def tone(hertz, seconds):
    return np.sin(np.arange(int(seconds * RATE)) * (2 * np.pi * hertz / RATE), dtype=np.float32)


@pytest.fixture(scope="module")
def batch(prompts):
    """Two prompts of the same tokens that hear different tones, one that hears two, two that hear
    nothing. What is heard is far enough from the end to be left out, and near enough to be seen
    through two layers' windows."""
    before, after, between = prompts(90, 150, 40, vocab=AUDIO)
    item = [AUDIO + 1, AUDIO, AUDIO + 2]

    def heard(tokens, *tones):
        return {"prompt_token_ids": tokens, "multi_modal_data": {"audio": list(tones)}}

    low, high = tone(300, 6), tone(3000, 6)
    return [
        heard(before + item + after, low),
        heard(before + item + after, high),
        heard(between + item + before + item + after, tone(900, 2), low),
        *({"prompt_token_ids": tokens} for tokens in (after + before, between)),
    ]


def run(engine, batch, *asked):
    """What is asked for with each prompt, if anything -> all outputs."""
    settings = [parameters(line, TOKENS) for line in asked or [None] * len(batch)]
    return engine.llm.generate(batch, settings, use_tqdm=False)


def answers(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def next_turn(batch, said, prompts):
    more = prompts(50, vocab=AUDIO, seed=1)[0]
    return [
        {**prompt, "prompt_token_ids": prompt["prompt_token_ids"] + answer + more}
        for prompt, answer in zip(batch, said, strict=True)
    ]


def assert_found(later, first):
    """All of the first turn's prompts is found again, up to two pages."""
    for now, before in zip(later, first, strict=True):
        assert now.num_cached_tokens > len(before.prompt_token_ids) - 2 * PAGE


@pytest.fixture(scope="module")
def stock(engine, model, batch, prompts):
    """What the stock engine says in two turns."""
    with engine(model, **OPTIONS) as plain:
        first = run(plain, batch)
        lengths = [len(output.prompt_token_ids) for output in first]
        assert lengths == [392, 392, 484, 240, 40], "25 embeddings a second"
        said = answers(first)
        assert said[0] != said[1], "what is heard matters"
        later = run(plain, next_turn(batch, said, prompts))
        assert_found(later, first)
        return said, answers(later)


@pytest.mark.parametrize("policy", FORCED)
def test_full_budget_equals_stock(engine, model, batch, prompts, stock, policy):
    with engine(model, {"policy": policy, "shortcut": False}, **OPTIONS) as planned:
        first = run(planned, batch)
        assert answers(first) == stock[0]
        later = run(planned, next_turn(batch, stock[0], prompts))
        assert answers(later) == stock[1]
        assert_found(later, first)
        layers = impls(planned).values()
        assert len(layers) == 2
        assert all(impl.planned for impl in layers)
        packed = 2 * len(batch) if policy.startswith(("snapkv", "keydiff")) else 0
        assert [impl.packed_prompts for impl in layers] == [packed] * 2


@pytest.mark.parametrize("server, lines", SMALL)
def test_small_budgets_answer_in_a_batch_as_alone(
    engine, model, batch, prompts, stock, server, lines
):
    """Also where the tokens are another prompt's and only what is heard is not."""
    asked = [line for line in lines for _ in batch]

    def alone(turn):
        for prompt, line in zip(turn, asked, strict=True):
            planned.forget()
            yield answers(run(planned, [prompt], line))[0]

    with engine(model, server, **OPTIONS) as planned:
        turn = batch * len(lines)
        first = run(planned, turn, *asked)
        said = answers(first)
        further = next_turn(turn, said, prompts)
        later = run(planned, further, *asked)
        assert_found(later, first)
        assert said == list(alone(turn))
        assert answers(later) == list(alone(further))
    for line in lines:
        low, high, both, text, short = said[: len(batch)]
        said = said[len(batch) :]
        assert short == stock[0][-1], f"{line} leaves nothing of it out"
        assert [low, high, both, text] != stock[0][:-1], f"{line} is small enough to matter"
        assert low != high, f"{line}: what is heard matters"
