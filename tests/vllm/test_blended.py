"""Chunks taken from elsewhere: against a plain Llama that reads each of them alone and then goes on,
and against what vLLM says of the whole prompt where what was stored is the whole prompt's."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from kvplug import arrange
from tests.plain_llama import Plain
from tests.vllm.test_lifecycle import preemptions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

S = 32
LINE = "blend(links=8)"


def named(*lengths, first=0):
    """Spans of chunks that follow one another."""
    spans = []
    for length in lengths:
        spans.append([first, first + length])
        first += length
    return spans


class Blended(Plain):
    """Each chunk is read alone, at the positions that it has in the prompt; what is not taken of
    them, and all else, sees what was taken of those before it and one another."""

    def agrees(self, prompt, answer, spans=()):
        tokens, size = prompt + answer, self.size
        chunks = tuple((first, last) for first, last in spans)
        arrangement = arrange(self.policy.reuse, chunks, len(prompt), size)
        read, stands, own, taken = [], [], [], []
        for number, placed in enumerate(arrangement.placed):
            for n in range(placed.pages.stop * size):
                read.append(tokens[placed.start + n])
                stands.append(placed.start + n)
                own.append(number)
                taken.append(n >= placed.pages.start * size)
        held = {place for place, there in zip(stands, taken, strict=True) if there}
        for place, token in enumerate(tokens):
            if place not in held:
                read.append(token)
                stands.append(place)
                own.append(-1)
                taken.append(True)
        own, taken, place = torch.tensor(own), torch.tensor(taken), torch.tensor(stands)
        alone = (own[:, None] == own) & (own >= 0)
        self.mask = (alone | ((own < 0)[:, None] & taken)) & (place <= place[:, None])
        with torch.inference_mode():
            logits = self.model(torch.tensor([read]), position_ids=place[None]).logits[0]
        said = logits[-len(answer) - 1 : -1].argmax(-1).tolist()
        return next(
            (n for n, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b), len(answer)
        )

    def seen(self, query, key, value, scaling, first_head):
        return self.mask.repeat(len(key), 1, 1)


def params(spans=None, tokens=40, **more):
    extra = None if spans is None else {"kvplug": {"chunks": spans}}
    return SamplingParams(
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        max_tokens=tokens,
        extra_args=extra,
        **more,
    )


def ask(engine, *asked, tokens=40, **more):
    """All at once: prompts, or pairs of them and their chunks. -> (answer, cached tokens) each"""
    asked = [one if isinstance(one, tuple) else (one, None) for one in asked]
    said = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in asked],
        [params(spans, tokens, **more) for _, spans in asked],
        use_tqdm=False,
    )
    for (prompt, _), each in zip(asked, said, strict=True):
        assert each.prompt_token_ids == prompt, "the user's own list"
    return [(list(each.outputs[0].token_ids), each.num_cached_tokens) for each in said]


def read_alone(engine, *chunks, **more):
    ask(engine, *chunks, tokens=1, **more)


@pytest.mark.both
def test_chunks_in_any_order_answer_by_the_definition(engine, random_llama, prompts):
    model = random_llama(layers=3)
    a, b, c, asks, other = prompts(128, 100, 170, 45, 30)
    plain = Blended(model, LINE, S)
    with engine(model, {"policy": LINE}) as blending:
        blending.poison(freed=False)
        free = blending.free_blocks
        prompt, spans = a + b + c + asks, named(128, 100, 170)
        ((whole, cached),) = ask(blending, (prompt, spans))
        assert cached == 0, "nothing was read alone"
        assert plain.agrees(prompt, whole) == 40
        blending.forget()
        read_alone(blending, a, b, c)
        assert blending.free_blocks == free
        ((answer, cached),) = ask(blending, (prompt, spans))
        assert cached == 128 + 64 + 128, "whole blocks of each, but the second's and third's first"
        assert plain.agrees(prompt, answer, spans) == 40
        assert plain.agrees(prompt, answer) < 40, "not what the whole prompt says"
