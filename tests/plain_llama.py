"""Packed requests as a plain Llama of transformers would answer them, for either engine."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from kvplug import Planner, PromptKV, Settings, keep_tokens, parse


class Plain:
    """A Llama of transformers over whole sequences, whose every query sees what the definition of
    a policy leaves it."""

    def __init__(self, model: Path, policy: str, page_size: int) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.policy = parse(policy)
        self.scored = self.policy.scored
        self.size = page_size
        self.schedule = Planner(Settings(policy=parse(policy)), page_size).schedule
        self.prompt = self.events = 0
        AttentionInterface.register("packing", self.attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="packing"
        ).eval()

    def attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        """query [1, Hq, T, D], key, value [1, H, T, D]"""
        first_head = module.layer_idx * key.shape[1]
        seen = self.seen(query[0], key[0], value[0], scaling, first_head)  # [H, T, T]
        group = query.shape[1] // key.shape[1]
        keys, values = (x[0].repeat_interleave(group, 0) for x in (key, value))
        logits = query[0] @ keys.mT * scaling
        logits = logits.masked_fill(~seen.repeat_interleave(group, 0), float("-inf"))
        out = logits.softmax(-1) @ values
        return out.transpose(0, 1)[None].contiguous(), None

    def seen(self, query, key, value, scaling, first_head):
        (H, T, _), S = key.shape, self.size
        seen = torch.ones(T, T, dtype=torch.bool).tril().repeat(H, 1, 1)
        step = tuple(np.array([n]) for n in (0, T, self.prompt))
        held = torch.zeros(H, 0, dtype=torch.int64)  # what each head has kept, ascending
        for event in self.schedule.events(*step):
            new = torch.arange(event.pages.start * S, event.pages.stop * S)
            if not event.era:
                new = new[: event.tokens]
            source = torch.cat([held, new.expand(H, -1)], 1)
            at = event.tokens if not event.era else event.pages.stop * S
            keys, values = (
                torch.stack([x[h, source[h]] for h in range(H)], 1)[None]
                for x in self.read(key, value, at)
            )
            queries = None
            if self.scored.needs_queries:
                window = query[:, at - self.scored.window : at].transpose(0, 1)
                queries = window.unflatten(1, (H, -1))[None]
            given = PromptKV(
                keys=keys, values=values, queries=queries, lengths=torch.tensor([event.tokens]),
                scale=scaling, first_head=first_head, page_size=S, event=event.era,
            )  # fmt: skip
            held = source.gather(1, self.keep(event, given))
            self.pack(held, at)
            first = event.pages.start if self.schedule.appends else 0
            seen[:, at:, first * S : at // S * S] = False
            seen[:, at:] |= torch.zeros(H, T, dtype=torch.bool).scatter(1, held, True)[:, None]
            if self.schedule.appends:
                held = held[:, :0]
            seen &= torch.ones(T, T, dtype=torch.bool).tril()
            self.events += 1
        return seen

    def keep(self, event, given):
        """What each head keeps at an event of what it reads. [H, n]"""
        keep = event.kept * self.size
        return keep_tokens(self.schedule.scorer(event), given, torch.tensor([keep]), keep)[0]

    def read(self, key, value, at):
        """What an event behind so many tokens reads of them."""
        return key, value

    def pack(self, held, at):
        """What each head has kept [H, n] of the tokens before that."""

    def agrees(self, prompt: list[int], answer: list[int]) -> int:
        """Tokens of an answer before the first that this model would not have said."""
        self.prompt = len(prompt)
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + answer])).logits[0]
        said = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return next(
            (n for n, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b), len(answer)
        )


class TwoKinds(Plain):
    """Heads that retrieve, and heads that keep their first and newest tokens."""

    pages: ClassVar[set[tuple[int, int, int]]] = set()
    """Layer, head and pages of what was kept."""

    def keep(self, event, given):
        duo, S, H = self.scored, self.size, given.keys.shape[2]
        layer, whole = given.first_head // H, event.tokens // S
        kinds = duo.kinds(layer) or (True,) * H
        some, others = kinds.count(True), kinds.count(False)
        window = min(-(-(duo.sink + duo.recent) // S), event.kept)
        most = min((event.kept * H - window * others) // some, whole)
        rest = min((event.kept * H - most * some) // max(others, 1), whole)
        kept = []
        for head, retrieves in enumerate(kinds):
            count = (most if retrieves else rest) * S
            if retrieves:
                mine = keep_tokens(duo.base, given, torch.tensor([count]), count)[0, head].tolist()
            else:
                mine = [*range(duo.sink), *range(whole * S - count + duo.sink, whole * S)]
            self.pages.add((layer, head, len(mine) // S))
            kept.append(mine + mine[:1] * (most * S - count))  # twice the same is once
        return torch.tensor(kept)


class Narrow(Plain):
    """A prompt's queries see their first tokens and the most recent ones alone, by pages."""

    def seen(self, query, key, value, scaling, first_head):
        policy, S, T = self.policy.generate, self.size, query.shape[1]
        i, j = torch.arange(T)[:, None], torch.arange(T)
        begin = i // policy.block * policy.block
        recent = (begin - policy.window + 1).clamp(min=0) // S * S
        all_of_it = i >= self.prompt - policy.last
        seen = (j < -(-policy.sinks // S) * S) | (j >= recent) | all_of_it
        return (seen & (j <= i)).repeat(len(key), 1, 1)


class Coded(Plain):
    """Pages before a query's own are read as KIVI codes them, its own as they are; what a prompt
    is packed into is coded again."""

    def attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        self.format = self.policy.format.in_layer(module.layer_idx)
        self.versions = [(0, *self.coded(key[0], value[0]))]
        seen = self.seen(query[0], key[0], value[0], scaling, module.layer_idx * key.shape[1])
        if self.policy.selector and self.policy.selector.layer_budget(module.layer_idx):
            self.select(query[0], seen, scaling)
        group, (T, S) = query.shape[1] // key.shape[1], (key.shape[2], self.size)
        own = torch.arange(T)[:, None] // S == torch.arange(T) // S  # of a query's own page
        own &= torch.ones(T, T, dtype=torch.bool).tril()

        def each(x):
            return x.repeat_interleave(group, 0)

        parts, ends = [], [at for at, *_ in self.versions[1:]] + [T]
        for (at, keys, values), end in zip(self.versions, ends, strict=True):
            asked, mine = query[0][:, at:end], own[at:end]
            logits = torch.where(mine, asked @ each(key[0]).mT, asked @ each(keys).mT) * scaling
            weights = logits.masked_fill(~each(seen[:, at:end]), float("-inf")).softmax(-1)
            parts.append((weights * mine) @ each(value[0]) + (weights * ~mine) @ each(values))
        return torch.cat(parts, 1).transpose(0, 1)[None].contiguous(), None

    def seen(self, query, key, value, scaling, first_head):
        if self.policy.eviction is None:
            return super().seen(query, key, value, scaling, first_head)
        T, planner = key.shape[1], Planner(Settings(policy=self.policy), self.size)
        i, page = np.arange(T), np.arange(T) // self.size
        seen = (page >= planner.first_pages(i)[:, None]) | np.isin(page, planner.held)
        seen &= page <= page[:, None]
        return torch.from_numpy(seen).tril().repeat(len(key), 1, 1)

    def coded(self, key, value):
        """[H, T, D] twice: keys by channel over a page, values by token over a group."""
        bits, value_bits = self.format.bits, self.format.value_bits
        value_bits = value_bits or bits
        whole, D = key.shape[1] // self.size * self.size, key.shape[2]
        pages = key[:, :whole].unflatten(1, (-1, self.size))
        keys = torch.cat([nearest(pages, 2, bits).flatten(1, 2), key[:, whole:]], 1)
        group = min(D, 32 if value_bits == 2 else 64)
        values = nearest(value.unflatten(2, (-1, group)), 3, value_bits).flatten(2)
        return keys, values

    def read(self, key, value, at):
        whole, (_, keys, values) = at // self.size * self.size, self.versions[-1]
        return tuple(
            torch.cat([coded[:, :whole], plain[:, whole:]], 1)
            for coded, plain in ((keys, key), (values, value))
        )

    def pack(self, held, at):
        _, *before = self.versions[-1]
        where = held[..., None].expand(-1, -1, before[0].shape[2])
        again = self.coded(*(x.gather(1, where) for x in before))
        now = (x.scatter(1, where, new) for x, new in zip(before, again, strict=True))
        self.versions.append((at, *now))

    def select(self, query, seen, scaling):
        """What decoding queries read, by the codes of the pages before their own."""
        selector, S = self.policy.selector, self.size
        group = len(query) // len(seen)
        for i in range(self.prompt, seen.shape[1]):
            keys = next(keys for at, keys, _ in reversed(self.versions) if at <= i)
            for head, mine in enumerate(seen[:, i]):
                tokens = mine.nonzero().flatten()
                keep = int(selector.units(np.array([len(tokens)]), S)[0])
                before = (len(tokens) - 1) // S * S
                asked = query[head * group :][:group, i]
                pages = keys[head, tokens[:before]].unflatten(0, (-1, S))
                if selector.unit(S) == S:
                    low, high = pages.amin(1), pages.amax(1)
                    bounds = torch.maximum(asked[:, None] * low, asked[:, None] * high)
                    weights = bounds.sum(-1).amax(0)
                    chosen = weights.topk(min(keep - 1, len(pages))).indices
                    read = (chosen[:, None] * S + torch.arange(S)).flatten()
                else:
                    logits = asked @ pages.flatten(0, 1).mT * scaling
                    weights = logits.softmax(-1).mean(0)
                    weights[: selector.sinks] = 2
                    read = weights.topk(keep - (len(tokens) - before)).indices
                mine[tokens[:before]] = False
                mine[tokens[read]] = True


def nearest(x, dim, bits):
    """The nearest of 2 ** bits numbers, evenly from a dimension's lowest to its highest."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low).clamp(min=1e-30) / (2**bits - 1)
    return low + step * ((x - low) / step + 0.5).floor()
