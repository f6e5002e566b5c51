"""A session whose turns stream in: one request, whose prompt grows by its own answers."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug import Refused

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
TOKENS = 20


def send(core, turn: list[int]) -> Any:
    """One turn, as AsyncLLM hands it over."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False
    )
    request = core.input_processor.process_inputs(
        "session",
        {"prompt_token_ids": list(turn)},
        parameters,
        supported_tasks=("generate",),
        resumable=True,
    )
    core.engine_core.add_request(request)


def answer(core) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < TOKENS:
        for output in core.engine_core.get_output().outputs:
            tokens += output.new_token_ids
    return tokens


@pytest.mark.parametrize(
    "policy",
    ["quest(budget=4096, dense_layers=0)", "streaming_llm(sinks=4, window=100)"],
)
def test_a_session_answers_as_requests_that_bring_their_whole_prompt(
    engine, random_llama, prompts, policy
):
    with engine(random_llama(layers=3), {"policy": policy}) as ours:
        core = ours.llm.llm_engine
        said: list[int] = []
        for turn in prompts(300, 70, 150):
            send(core, turn)
            answered = answer(core)
            said += turn
            assert ours.generate([said], TOKENS) == [answered]
            said += answered[:-1]  # vLLM drops the last token, which nobody has computed
        core.engine_core.abort_requests(["session"])


@pytest.mark.parametrize(
    "given",
    [
        {"policy": "snapkv(budget=96)"},
        {"policy": "dense", "allow": ["quest"]},
    ],
)
def test_a_session_is_refused_where_prompts_are_compressed(engine, random_llama, prompts, given):
    """Its second turn would read blocks that its first has given back."""
    (turn,) = prompts(300)
    with (
        engine(random_llama(layers=3), given) as ours,
        pytest.raises(Refused, match="send each turn as a request with the whole prompt"),
    ):
        send(ours.llm.llm_engine, turn)
