"""Prompts that name their chunks, and a plain Llama that reads each of them alone and then goes
on, for either engine."""

from __future__ import annotations

from itertools import chain, permutations

import torch

from kvplug import arrange
from tests.plain_llama import Plain


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
        said = self.said(prompt, answer, spans)
        return next(
            (n for n, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b), len(answer)
        )

    def said(self, prompt, answer, spans=()):
        """What it would say behind each token of an answer."""
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
        return logits[-len(answer) - 1 : -1].argmax(-1).tolist()

    def seen(self, query, key, value, scaling, first_head):
        return self.mask.repeat(len(key), 1, 1)


def crowded(prompts):
    """Chunks in each order, with something behind them, and the chunks."""
    a, b, c, *asks = prompts(96, 64, 70, 1, 1, 2, 3, 9, 26)
    asked = [
        ([*chain(*parts, more)], named(*map(len, parts)))
        for parts, more in zip(permutations((a, b, c)), asks, strict=True)
    ]
    return asked, (a, b, c)
