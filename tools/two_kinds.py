"""What heads of two kinds save: duo around scorers, beside the scorers and random at equal bytes.

    make setup models
    cat README.md docs/*.md > text.md
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/kvplug calibrate .models/smollm2 --text text.md \\
        --out heads.json --context 1024 --density 0.25 --sinks 32 --window 96
    PYTHONPATH=.:kernels:evals .venvs/vllm/bin/python tools/two_kinds.py heads.json [--engine]

For ``--task recall --model .models/recall --tokens 2048 --retrieval 0.25`` the text is what
``kvplug_evals.models.recall.recall_prompt(2048, 64, 24, seed)`` says, of seeds 900 to 903, and the
heads are calibrated with ``--context 2048``.

Prompts are computed once by transformers in float32, packed as an engine packs them, head by head,
and what follows is fed behind what was kept, as ``tools/boundaries.py`` does with the same tasks;
with ``--engine`` vLLM serves the same, a server for each policy, and says how many blocks it held;
``copy`` is text of which a passage comes again, half of it to find the other half by. The loss is
-log p of the true answer, in nats a token; right are tokens that greedy decoding would have said.
Heads are calibrated on other text than is judged. Minutes for each task.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from boundaries import PAGE, WINDOW, Case, Model, asked, texts
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from kvplug import HeadBudgets, PromptKV, ScoredEviction, keep_tokens, parse
from kvplug_evals.engines.interface import EngineOptions, Request


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


def policies(file: str, budget: int, retrieval: float) -> Iterator[tuple[str, str]]:
    """Their names and lines."""
    quarter = budget // 2 // 4
    for base in ("snapkv", "keydiff", "random"):
        line = f"{base}(budget={budget})"
        duo = f"heads={file!r}, retrieval={retrieval}, sink={quarter}, recent={3 * quarter}"
        yield base, line
        yield f"duo({base})", f"duo({line}, {duo})"


Answers = list[tuple[float, float]]
"""Of each case the mean loss, and the share of its tokens that were right."""


def computed(
    folder: Path, cases: Sequence[Case], lines: dict[str, str]
) -> Iterator[tuple[str, Answers]]:
    """By transformers."""
    model, found = Heads(folder), defaultdict[str, Answers](list)
    scored = {name: parse(line).scored for name, line in lines.items()}
    for number, (prompt, forced, answer) in enumerate(cases):
        model.read(prompt)
        for name, policy in scored.items():
            losses, right = model.answers(policy, forced, answer)
            found[name].append((float(losses.mean()), float(right.mean())))
        print(number, len(prompt), flush=True)
    yield from found.items()


def served(
    folder: Path, cases: Sequence[Case], lines: dict[str, str]
) -> Iterator[tuple[str, Answers]]:
    """By vLLM, four requests at once."""
    from kvplug_evals.engines.vllm import VLLMEngine

    requests = [
        Request(key=str(number), prompt=prompt, forced=forced, scored=answer)
        for number, (prompt, forced, answer) in enumerate(cases)
    ]
    longest = max(len(each.prompt) + len(each.forced) for each in requests)
    options = EngineOptions(
        model=str(folder), max_model_len=longest + 64, max_num_seqs=4, block_size=PAGE,
        dtype="float32", multiprocess=False,
    )  # fmt: skip
    for name, line in lines.items():
        engine, answers, held = VLLMEngine(line, options), [], set()
        for first in range(0, len(requests), options.max_num_seqs):
            wave = engine.run(requests[first : first + options.max_num_seqs])
            engine.forget()
            held.add(wave.held_blocks / len(wave.replies))
            answers += [(mean(each.losses), mean(each.agreed)) for each in wave.replies]
        engine.close()
        print(f"{name:14} {min(held):.1f} to {max(held):.1f} blocks a request")
        yield name, answers


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
    parser.add_argument("--engine", action="store_true", help="vLLM serves, not transformers")
    given = parser.parse_args()
    own = {"text": texts, "copy": copies}
    cases = list(
        own[given.task](given.model, given.tokens)
        if given.task in own
        else asked(given.model, given.task, given.tokens, given.contexts, not given.agnostic)
    )
    if given.task in own:  # source and prose
        cases = cases[:: max(len(cases) // given.contexts, 1)]
    budget = round(mean(len(prompt) for prompt, *_ in cases) * given.share / PAGE) * PAGE
    assert budget >= 2 * WINDOW
    lines = {"dense": "dense", **dict(policies(given.heads, budget, given.retrieval))}
    found: dict[str, Answers] = {}
    for name, each in (served if given.engine else computed)(given.model, cases, lines):
        found[name] = each
        loss, right = (mean(part) for part in zip(*each, strict=True))
        alone = found.get(name.removeprefix("duo(").rstrip(")"), each)
        apart = ""
        if alone is not each and len(each) > 1:
            gained = [a - b for (a, _), (b, _) in zip(alone, each, strict=True)]
            error = stdev(gained) / len(gained) ** 0.5
            apart = f", {mean(gained):+.3f} +- {error:.3f} nats less than alone"
        print(f"{name:14} loss {loss:.3f}, right {right:.3f}, of {len(each)}{apart}", flush=True)


if __name__ == "__main__":
    main()
