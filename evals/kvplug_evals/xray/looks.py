"""One request under a policy line in a plain float32 model, every look of every KV head recorded.

Schedules, kept tokens and selections are the core's own (``Planner``, ``keep_tokens``,
``choose_units``); attention is a softmax over what they leave. The prompt is computed at once; the
answer is dense attention's, a token a step, so that both see the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvplug import (
    Composition,
    HeadBudgets,
    Offer,
    Planner,
    PromptKV,
    Segments,
    Settings,
    choose_units,
    keep_tokens,
    parse,
)
from kvplug.segments import HELD

NAME = "kvplug_xray"
KEPT, READ = 16, 32
LEVELS = 15
"""Of an attention weight, in steps of a factor of two below 1."""


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Of A answer tokens, in L layers of H KV heads, at T tokens of prompt and answer."""

    tokens: list[str]
    prompt: int
    answer: list[str]
    """What dense attention says."""
    said: list[str]
    """What the policy would have said there."""
    seen: np.ndarray
    """[A, L, H, T] uint8: KEPT where it is in the cache, READ where it is read, and the level of
    its dense attention weight, mean over the KV head's query heads: 0 below 2 ** -14, else 15 +
    log2, rounded down."""
    lost: np.ndarray
    """[A, L, H] share of the dense attention that is on tokens which are not read."""
    layers: list[int]
    """Numbers of the model's layers that are shown: those that see all."""
    strongest: np.ndarray
    """[A, L, H] the token behind the first page and before the newest that weighs most; -1
    without one."""


def check_line(line: str) -> Composition:
    """Raises ValueError for what no look of one request's answer can show."""
    policy = parse(line)
    scored = policy.scored
    if policy.generate is not None:
        raise ValueError(
            f"kvplug xray shows what an answer keeps and reads, and {policy.generate.name} is "
            "about how a prompt is read; leave it out of the line"
        )
    if policy.local is not None:
        raise ValueError(
            f"kvplug xray shows what policies choose, and {policy.local} names a window that is "
            "the same for every text; leave it out of the line"
        )
    if scored is not None and (scored.chunk is not None or scored.compiles):
        raise ValueError(
            f"kvplug xray computes a prompt at once, and {scored} packs it while it comes; leave "
            "chunk out, or show snapkv(budget=1024)"
        )
    if isinstance(scored, HeadBudgets):
        raise ValueError(
            f"kvplug xray shows heads that keep as many tokens, and {scored.name} gives them "
            f"different numbers; show {scored.base}"
        )
    return policy


class Xray:
    """A model of transformers whose decode steps see what a policy leaves them."""

    def __init__(self, model: Any, line: str, page_size: int) -> None:
        self.model, self.size = model, page_size
        self.policy = check_line(line)
        self.settings = Settings(policy=self.policy)
        self.offer = Offer(settings=self.settings)
        self.prompt = 0
        self.planners: dict[int, Planner] = {}
        self.layers: dict[int, _Layer] = {}
        self.dense = True

    def look(
        self, prompt: Tensor, steps: int, tell: Callable[[int, int], None] = lambda *_: None
    ) -> tuple[list[int], list[int], dict[int, list[_Look]]]:
        """prompt [T] -> the answer's steps + 1 tokens, what the policy says for all but the first
        of them, and the looks of each planned layer. tell: steps done, and of how many."""
        self.prompt = len(prompt)
        with torch.inference_mode(), self._attending():
            self.dense = True
            first, cache = self._begin(prompt)
            answer = self._go_on(first, deepcopy(cache), steps, None, lambda n: tell(n, 2 * steps))
            self.dense = False
            if self.policy.eviction is not None:  # it changes how the prompt is read
                first, cache = self._begin(prompt)
            said = self._go_on(first, cache, steps, answer, lambda n: tell(steps + n, 2 * steps))
        return answer, said[1:], {n: layer.looks for n, layer in sorted(self.layers.items())}

    def _begin(self, prompt: Tensor) -> tuple[int, Any]:
        """The model's first choice behind the prompt, and the cache that it leaves."""
        from transformers import DynamicCache

        self.layers, cache = {}, DynamicCache()
        return self._step(prompt[None], cache), cache

    def _go_on(
        self, first: int, cache: Any, steps: int, forced: list[int] | None,
        tell: Callable[[int], None],
    ) -> list[int]:  # fmt: skip
        """Its first choices from there on, behind each token of the answer: which those choices
        are themselves, or ``forced``."""
        said = [first]
        for step in range(steps):
            given = said if forced is None else forced
            said.append(self._step(torch.tensor([[given[step]]]), cache))
            tell(step + 1)
        return said

    def _step(self, given: Tensor, cache: Any) -> int:
        found = self.model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    @contextmanager
    def _attending(self) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, self._attend)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        """query [1, Hq, n, D], key, value [1, H, T, D] -> [1, n, Hq, D]"""
        if given.get("s_aux") is not None or given.get("softcap"):
            raise ValueError(
                "kvplug xray computes plain softmax attention, and this model's has sinks or a "
                "cap; use another model"
            )
        scale = given.get("scaling") or query.shape[-1] ** -0.5
        window = given.get("sliding_window")
        if window is None:
            window = getattr(module, "sliding_window", None)
        group = query.shape[1] // key.shape[1]
        if query.shape[2] == 1 and window is None and not self.dense:
            number = module.layer_idx
            layer = self.layers[number]
            out = layer.decode(query[0, :, 0], key[0], value[0], scale)
            return out[None, None], None
        seen = self._prompt_mask(query.shape[2], key.shape[2], window)
        if window is None and query.shape[2] > 1:
            self.layers[module.layer_idx] = _Layer(self, module.layer_idx, query[0])
        keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
        out = scaled_dot_product_attention(
            query, keys, values, seen, is_causal=seen is None, scale=scale
        )
        return out.transpose(1, 2).contiguous(), None

    def _prompt_mask(self, queries: int, tokens: int, window: int | None) -> Tensor | None:
        """What the last queries of so many tokens see: [queries, tokens] bool; None for all, by
        position."""
        whole = window is None and (self.dense or self.policy.eviction is None)
        if whole and queries == tokens:
            return None
        at, other = torch.arange(tokens)[-queries:, None], torch.arange(tokens)
        seen = other <= at
        if window is not None:
            return seen & (other > at - window)
        eviction = self.policy.eviction
        if self.dense or eviction is None:
            return seen
        planner = self.planner(None)
        first = torch.from_numpy(planner.first_pages(at[:, 0].numpy()))[:, None]
        page = other // self.size
        return seen & ((page >= first) | torch.isin(page, torch.from_numpy(planner.held)))

    def planner(self, budget: int | None) -> Planner:
        return self.planners.setdefault(budget or 0, Planner(self.settings, self.size, budget))

    def budget(self, number: int) -> int | None:
        """Tokens that a layer keeps of the prompt, where layers differ."""
        if self.policy.uniform:
            return None
        planned = sorted(self.layers)
        return self.policy.layer_budgets(len(planned))[planned.index(number)]


@dataclass
class _Look:
    """Of one query in one layer."""

    kept: Tensor
    """[H, T] bool"""
    read: Tensor
    """[H, T] bool"""
    weight: Tensor
    """[H, T] of dense attention, mean over a KV head's query heads."""


@dataclass
class _Layer:
    """A planned layer of one request: what it was packed to, and its looks."""

    xray: Xray
    number: int
    queries: Tensor
    """Of the prompt and of the answer. [Hq, n, D]"""
    held: Tensor | None = None
    """Tokens that each head has kept, ascending. [H, private tokens]"""
    looks: list[_Look] = field(default_factory=list)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [Hq, D], key, value [H, T, D], its own token the last -> [Hq, D]"""
        (heads, tokens, _), xray = key.shape, self.xray
        self.queries = torch.cat([self.queries, query[:, None]], 1)
        planner = xray.planner(xray.budget(self.number))
        self._pack(planner, key, value, scale)
        step = [np.array([n]) for n in (tokens - 1, tokens, xray.prompt)]
        segment = planner.plan(*step)
        row = self._row(planner, segment, heads, tokens)
        read = self._selected(planner, segment, row, query, key, scale)
        kept = torch.zeros(heads, tokens, dtype=torch.bool).scatter_(1, row, True)
        chosen = kept
        if read is not None:
            chosen = torch.zeros_like(kept)
            for head, each in enumerate(read):
                chosen[head, row[head, each]] = True
        grouped = query.unflatten(0, (heads, -1))  # [H, G, D]
        logits = grouped @ key.mT * scale
        weight = logits.softmax(-1).mean(1)
        out = logits.masked_fill(~chosen[:, None], float("-inf")).softmax(-1) @ value
        self.looks.append(_Look(kept, chosen, weight))
        return out.flatten(0, 1)

    def _pack(self, planner: Planner, key: Tensor, value: Tensor, scale: float) -> None:
        """What the step of the last token packs."""
        (heads, tokens, _), size = key.shape, planner.page_size
        step = [np.array([n]) for n in (tokens - 1, tokens, self.xray.prompt)]
        schedule = planner.schedule
        for event in schedule.events(*step):
            new = torch.arange(event.pages.start * size, event.pages.stop * size)
            at = event.tokens if not event.era else event.pages.stop * size
            new = new[: event.tokens] if not event.era else new
            before = torch.zeros(heads, 0, dtype=torch.int64) if self.held is None else self.held
            source = torch.cat([before, new.expand(heads, -1)], 1)
            scorer = schedule.scorer(event)
            queries = None
            if scorer.needs_queries:
                window = self.queries[:, at - scorer.window : at].transpose(0, 1)
                queries = window.unflatten(1, (heads, -1))[None]
            index = source[..., None].expand(-1, -1, key.shape[2])
            given = PromptKV(
                keys=key.gather(1, index).transpose(0, 1)[None],
                values=value.gather(1, index).transpose(0, 1)[None],
                queries=queries,
                lengths=torch.tensor([event.tokens]),
                scale=scale,
                first_head=self.number * heads,
                page_size=size,
                event=event.era,
            )
            keep = event.kept * size
            chosen = keep_tokens(scorer, given, torch.tensor([keep]), keep, event.protect)[0]
            self.held = source.gather(1, chosen)

    def _row(self, planner: Planner, segment: Segments, heads: int, tokens: int) -> Tensor:
        """Tokens that the query sees, in the order of its pages. -> [H, visible]"""
        size, first = planner.page_size, int(segment.first[0])
        later = torch.arange(first * size, tokens).expand(heads, -1)
        if not first:
            return later
        if segment.packed[0] == HELD:
            pages = torch.from_numpy(planner.held_pages(int(segment.kept[0])))
            start = (pages[:, None] * size + torch.arange(size)).flatten().expand(heads, -1)
        else:
            assert self.held is not None
            start = self.held
        return torch.cat([start, later], 1)

    def _selected(
        self, planner: Planner, segment: Segments, row: Tensor, query: Tensor, key: Tensor,
        scale: float,
    ) -> list[Tensor] | None:  # fmt: skip
        """What each KV head reads of its row; None for all."""
        selector, budget = planner.selector, planner.layer_budget(self.number)
        if selector is None or budget is None or not segment.selects[0]:
            return None
        (heads, seen), dim, page = row.shape, key.shape[2], planner.page
        pages = -(-seen // page)
        cached = key.new_zeros(pages * page, heads, dim)
        cached[:seen] = key.gather(1, row[..., None].expand(-1, -1, dim)).transpose(0, 1)
        digest = None
        if selector.digest is not None:
            rows = selector.digest.rows(page, 4)
            digest = key.new_zeros(pages, heads, rows, dim)
            slots = torch.arange(seen)
            by_page = cached.unflatten(0, (pages, page))
            selector.digest.update(digest, cached[:seen], slots, by_page)
        keep = planner.selection(segment, budget)
        chosen, counts = choose_units(
            selector,
            query.unflatten(0, (heads, -1))[None],
            digest,
            torch.arange(pages, dtype=torch.int32)[None],
            torch.tensor([pages], dtype=torch.int32),
            torch.tensor([seen], dtype=torch.int32),
            torch.from_numpy(keep).int(),
            page_size=page,
            width=int(keep[0]),
            scale=scale,
        )
        unit = planner.unit
        found = []
        for head in range(heads):
            units = chosen[0, head, : int(counts[0, head])].long()
            units = (units[:, None] * unit + torch.arange(unit)).flatten()
            found.append(units[units < seen])
        return found


def take(
    folder: Path, text: str, line: str, steps: int, page_size: int, longest: int,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> Looks:  # fmt: skip
    """folder: a model of transformers. longest: tokens that the text is cut to. Raises ValueError
    with what was wanted, what came and what to write instead."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_line(line)
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no model at {folder}; write the folder of one")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < 2 * page_size:
        raise ValueError(
            f"the text has {len(ids)} tokens, and a look wants two pages of {page_size} at least; "
            "write a longer one, or a smaller --block-size"
        )
    ids = ids[:longest]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    xray = Xray(model, line, page_size)
    answer, said, looks = xray.look(ids, steps, tell)
    words = tokenizer.convert_ids_to_tokens([*ids.tolist(), *answer[:-1]])
    return folded(
        looks,
        prompt=len(ids),
        page_size=page_size,
        tokens=[_shown(tokenizer, word) for word in words],
        answer=[tokenizer.decode([token]) for token in answer[1:]],
        said=[tokenizer.decode([token]) for token in said],
    )


def folded(looks: dict[int, list[_Look]], *, page_size: int, **texts: Any) -> Looks:
    """Every layer's looks as the page has them."""
    layers = list(looks.values())
    steps, tokens = len(layers[0]), layers[0][-1].kept.shape[1]
    heads = layers[0][0].kept.shape[0]
    seen = np.zeros((steps, len(layers), heads, tokens), np.uint8)
    lost = np.zeros(seen.shape[:3], np.float32)
    strongest = np.full(seen.shape[:3], -1, np.int32)
    for n, of_layer in enumerate(layers):
        for step, look in enumerate(of_layer):
            T = look.kept.shape[1]
            level = (LEVELS + look.weight.clamp(min=1e-30).log2().floor()).clamp(0, LEVELS)
            both = level.to(torch.uint8) + KEPT * look.kept + READ * look.read
            seen[step, n, :, :T] = both.numpy()
            lost[step, n] = (look.weight * ~look.read).sum(1).numpy()
            newest = (T - 1) // page_size * page_size
            if newest > page_size:
                best = look.weight[:, page_size:newest].argmax(1) + page_size
                strongest[step, n] = best.numpy()
    return Looks(seen=seen, lost=lost, strongest=strongest, layers=list(looks), **texts)


def _shown(tokenizer: Any, word: str) -> str:
    text: str = tokenizer.convert_tokens_to_string([word])
    # Byte-level and sentence-piece words begin with a mark where they follow a space.
    return f" {text}" if word[:1] in "Ġ▁" and not text.startswith(" ") else text
