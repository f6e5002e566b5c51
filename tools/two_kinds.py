"""What heads of two kinds save: duo around scorers, beside the scorers and random at equal bytes.

    make setup models
    cat README.md docs/*.md > text.md
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/kvplug calibrate .models/smollm2 --text text.md \\
        --out heads.json --context 1024 --density 0.25 --sinks 32 --window 96
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/two_kinds.py heads.json

For ``--task recall --model .models/recall --tokens 2048 --retrieval 0.25`` the text is what
``kvplug_evals.models.recall.recall_prompt(2048, 64, 24, seed)`` says, of seeds 900 to 903, and the
heads are calibrated with ``--context 2048``.

Prompts are computed once by transformers in float32, packed as an engine packs them, head by head,
and what follows is fed behind what was kept, as ``tools/boundaries.py`` does with the same tasks;
``copy`` is text of which a passage comes again, half of it to find the other half by. The loss is
-log p of the true answer, in nats a token; right are tokens that greedy decoding would have said.
Heads are calibrated on other text than is judged. Minutes for each task.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from boundaries import PAGE, WINDOW, Case, Model, asked, texts
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from kvplug import HeadBudgets, PromptKV, ScoredEviction, keep_tokens, parse


class Heads(Model):
    """Whose heads keep different numbers of tokens, as those are padded to the most."""

    seen_heads: dict[int, Tensor]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any
    ) -> Any:
        if self.kept is None:
            return super().attend(module, query, key, value, *_, **more)
        before, padding = self.kept[module.layer_idx], self.seen_heads[module.layer_idx]
        key, value = (torch.cat(both, 2) for both in zip(before, (key, value), strict=True))
        new, total, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
        sees = torch.ones(len(padding), new, total, dtype=torch.bool).tril(total - new)
        sees[:, :, : padding.shape[1]] &= padding[:, None]
        sees = sees.repeat_interleave(group, 0)[None]
        out = attention(query, key, value, attn_mask=sees, scale=more["scaling"], enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    def answers(
        self, policy: ScoredEviction | None, forced: list[int], scored: int
    ) -> list[Tensor]:
        self.seen_heads = {}
        return super().answers(policy, forced, scored)

    def pack(
        self, policy: ScoredEviction | None, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        (_, H, T, D), whole = key.shape, key.shape[2] // PAGE
        if policy is None or policy.pages(PAGE) >= whole:
            self.seen_heads[layer] = torch.ones(H, T, dtype=torch.bool)
            return key, value
        private, kinds = policy.pages(PAGE), policy.kinds(layer)
        pages = np.full((1, H), private)
        if kinds is not None:
            assert isinstance(policy, HeadBudgets)
            pages = policy.head_pages(kinds, np.array([private]), np.array([whole]), PAGE)
        given = PromptKV(
            keys=key.transpose(1, 2), values=value.transpose(1, 2),
            queries=query.transpose(1, 2).unflatten(2, (H, -1)), lengths=torch.tensor([T]),
            scale=D**-0.5, first_head=layer * H, page_size=PAGE,
        )  # fmt: skip
        keep, width = torch.from_numpy(pages * PAGE), int(pages.max()) * PAGE
        tokens = keep_tokens(policy, given, keep, width)
        rest = torch.arange(whole * PAGE, T).expand(1, H, -1)
        at = torch.cat([tokens, rest], 2)[..., None]
        inside = torch.arange(width) < keep[0, :, None]
        self.seen_heads[layer] = torch.cat([inside, torch.ones_like(rest[0], dtype=torch.bool)], 1)
        return key.gather(2, at.expand(-1, -1, -1, D)), value.gather(2, at.expand(-1, -1, -1, D))


def copies(folder: Path, tokens: int) -> Iterator[Case]:
    """A passage of the first half of each text again: 16 tokens of it, and the 48 behind them."""
    for prompt, _, _ in texts(folder, tokens):
        begin = tokens // 4
        yield prompt, prompt[begin : begin + 64], 48


def policies(file: str, budget: int, retrieval: float) -> Iterator[tuple[str, ScoredEviction]]:
    quarter = budget // 2 // 4
    for base in ("snapkv", "keydiff", "random"):
        line = f"{base}(budget={budget})"
        duo = f"heads={file!r}, retrieval={retrieval}, sink={quarter}, recent={3 * quarter}"
        for name, written in ((base, line), (f"duo({base})", f"duo({line}, {duo})")):
            scored = parse(written).scored
            assert scored is not None
            yield name, scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", help="File of kvplug calibrate, of that model.")
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2"))
    parser.add_argument("--task", default="text", help="text, copy, needle, kv or recall")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--retrieval", type=float, default=0.5)
    parser.add_argument("--agnostic", action="store_true")
    given = parser.parse_args()
    model, found = Heads(given.model), defaultdict(list)
    own = {"text": texts, "copy": copies}
    cases = (
        own[given.task](given.model, given.tokens)
        if given.task in own
        else asked(given.model, given.task, given.tokens, given.contexts, not given.agnostic)
    )
    every = list(cases)
    if given.task in own:  # source and prose
        every = every[:: max(len(every) // given.contexts, 1)]
    for number, (prompt, forced, scored) in enumerate(every):
        model.read(prompt)
        found["dense"].append(model.answers(None, forced, scored))
        budget = round(len(prompt) * given.share / PAGE) * PAGE
        assert budget >= 2 * WINDOW
        for name, policy in policies(given.heads, budget, given.retrieval):
            found[name].append(model.answers(policy, forced, scored))
        print(number, len(prompt), flush=True)
    for name, each in found.items():
        losses, right = ([float(one[n].mean()) for one in each] for n in (0, 1))
        base = found.get(name.removeprefix("duo(").rstrip(")"), each)
        gained = [float(a[0].mean() - b[0].mean()) for a, b in zip(base, each, strict=True)]
        apart = ""
        if base is not each and len(each) > 1:
            error = stdev(gained) / len(gained) ** 0.5
            apart = f", {mean(gained):+.3f} +- {error:.3f} nats less than alone"
        print(f"{name:14} loss {mean(losses):.3f}, right {mean(right):.3f}, of {len(each)}{apart}")


if __name__ == "__main__":
    main()
