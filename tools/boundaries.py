"""What it saves to protect a prompt's boundaries: scorers at a quarter of it, with and without.

    make setup models
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/boundaries.py

*Protection Is (Nearly) All You Need* (https://arxiv.org/abs/2605.18053) keeps the first and the
last tenth of a budget whatever a scorer says. Here both are a policy's own ``sinks`` and
``window``. Prompts are computed once by transformers in float32, packed as an engine packs them,
and what follows is fed behind what was kept: needles in documentation, key-value pairs and exact
recall, with the question in the prompt or behind it (agnostic), and text that goes on. The loss is
-log p of the true answer, in nats a token; right are tokens that greedy decoding would have said.
Minutes for each task.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from kvplug import PromptKV, ScoredEviction, keep_tokens, parse
from kvplug_evals.scbench.documents import documents, encoder, history

PAGE, WINDOW = 32, 64
SCORERS = ("snapkv", "keydiff", "knorm", "random")
SOURCES = ("argparse", "ast", "tarfile", "inspect", "subprocess", "typing", "zipfile", "mailbox")
ANSWER = 64
"""Tokens of text that goes on."""

Case = tuple[list[int], list[int], int]
"""Prompt, what is fed behind it, and how many tokens at its end are scored."""


class Model:
    def __init__(self, folder: Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("boundaries", self.attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="boundaries"
        ).eval()
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = None
        self.prompt: list[int] = []

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any
    ) -> Any:
        """query [1, Hq, T, D], key, value [1, H, T, D]"""
        if self.kept is None:
            self.seen[module.layer_idx] = query[:, :, -WINDOW:], key, value
        else:
            before = self.kept[module.layer_idx]
            key, value = (torch.cat(both, 2) for both in zip(before, (key, value), strict=True))
        new, total = query.shape[2], key.shape[2]
        sees = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        out = attention(query, key, value, attn_mask=sees, scale=more["scaling"], enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    @torch.inference_mode()
    def read(self, prompt: list[int]) -> None:
        if prompt == self.prompt:
            return
        self.kept, self.seen, self.prompt = None, {}, prompt
        self.model(torch.tensor([prompt]), logits_to_keep=1)

    @torch.inference_mode()
    def answers(
        self, policy: ScoredEviction | None, forced: list[int], scored: int
    ) -> list[Tensor]:
        """(loss, right) of the last tokens of what is fed, in which each token meets the next."""
        length = self.seen[0][1].shape[2]
        self.kept = {n: self.pack(policy, n, *each) for n, each in self.seen.items()}
        at = torch.arange(length, length + len(forced))[None]
        logits = self.model(torch.tensor([forced]), position_ids=at).logits[0]
        said, wanted = logits[-scored - 1 : -1].log_softmax(-1), torch.tensor(forced[-scored:])
        return [-said.gather(1, wanted[:, None])[:, 0], (said.argmax(-1) == wanted).float()]

    def pack(
        self, policy: ScoredEviction | None, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        (_, H, T, D), whole = key.shape, key.shape[2] // PAGE * PAGE
        if policy is None or policy.pages(PAGE) * PAGE >= whole:
            return key, value
        keep = policy.pages(PAGE) * PAGE
        given = PromptKV(
            keys=key.transpose(1, 2), values=value.transpose(1, 2),
            queries=query.transpose(1, 2).unflatten(2, (H, -1)), lengths=torch.tensor([T]),
            scale=D**-0.5, first_head=layer * H, page_size=PAGE,
        )  # fmt: skip
        tokens = keep_tokens(policy, given, torch.tensor([keep]), keep)
        at = torch.cat([tokens, torch.arange(whole, T).expand(1, H, -1)], 2)[..., None]
        return key.gather(2, at.expand(-1, -1, -1, D)), value.gather(2, at.expand(-1, -1, -1, D))


def texts(folder: Path, tokens: int) -> Iterator[Case]:
    words = encoder(str(folder))
    sources = [Path(__import__(name).__file__ or "").read_text() for name in SOURCES]
    prose = "\n".join(topics[name] for name in sorted(topics))
    for text in [*sources, *(prose[n * 80_000 :] for n in range(len(SOURCES) // 2))]:
        ids = words(text[: tokens * 12]).input_ids
        yield ids[:tokens], ids[tokens : tokens + ANSWER], ANSWER - 1


def asked(folder: Path, task: str, tokens: int, contexts: int, aware: bool) -> Iterator[Case]:
    words = encoder(str(folder))
    options: dict[str, Any] = {"pairs": 256, "hops": 4} if task == "recall" else {}
    if task == "kv":
        options = {"vocabulary": "words", "pairs": 60}
    found = documents(
        task, pretrained=str(folder), tokens=tokens, contexts=contexts, turns=3,
        mode="multi-request", **options,
    )  # fmt: skip

    def ids(text: str) -> list[int]:
        return list(words(text, add_special_tokens=False).input_ids)

    for doc in found["test"]:
        assert not history(doc)
        parts = ("context", "question", "cue", "gold")
        context, question, cue, gold = (ids(doc[part]) for part in parts)
        prompt, behind = (context + question, cue) if aware else (context, question + cue)
        yield prompt, behind + gold, len(gold)


def variants(scorer: str, budget: int) -> Iterator[tuple[str, ScoredEviction]]:
    tenth = budget // 10
    window = max(tenth, WINDOW) if scorer == "snapkv" else tenth
    for name, options in {
        "nothing": "", "first": f", sinks={tenth}",
        "last": f", window={window}", "both": f", sinks={tenth}, window={window}",
    }.items():  # fmt: skip
        if scorer == "snapkv":  # whose window asks, and stays in any case
            options = options.replace(f", window={window}", f", window={WINDOW}")
        policy = parse(f"{scorer}(budget={budget}{options})").scored
        assert policy is not None
        yield name, policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2"))
    parser.add_argument("--task", default="text", help="text, needle, kv or recall")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--agnostic", action="store_true")
    parser.add_argument("--protect", nargs="+", default=["nothing", "first", "last", "both"])
    given = parser.parse_args()
    model, found = Model(given.model), defaultdict(list)
    if given.task == "text":
        cases = texts(given.model, given.tokens)
    else:
        cases = asked(given.model, given.task, given.tokens, given.contexts, not given.agnostic)
    for prompt, forced, scored in cases:
        model.read(prompt)
        found["dense", ""].append(model.answers(None, forced, scored))
        budget = round(len(prompt) * given.share / PAGE) * PAGE
        for scorer in SCORERS:
            for name, policy in variants(scorer, budget):
                if name in given.protect:
                    found[scorer, name].append(model.answers(policy, forced, scored))
    for (scorer, name), each in found.items():
        loss, right = (mean(float(one[n].mean()) for one in each) for n in (0, 1))
        print(f"{scorer:8} {name:8} loss {loss:.3f}, right {right:.3f}, of {len(each)}")


if __name__ == "__main__":
    main()
