"""What a model's heads look at, measured on text: ``kvplug calibrate``.

Contexts of n tokens are read whole, by transformers in float32, one after the other, so that one
bounds the memory; attention is computed by blocks of queries, and so is what is measured of it:

    recall    of a pattern (``kvplug.policies.minference``): the attention that goes to the
              ``density`` n tokens which a head's group reads by it, as a share of the head's own,
              in blocks that see more
    outside   the attention that a group's queries give neither to the first ``sinks`` tokens nor
              to their last ``window``, as a share, over the queries that see more
    lost      sum |o - o'|^2 / sum |o|^2 of those queries' outputs o, and o' where they see only
              the first ``sinks`` tokens and their last ``window``

means over blocks, or queries, and contexts. Layers with a window of their own are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from kvplug.heads import PATTERNS, Heads, Layer, Shape
from kvplug.policies.minference import FIRST, NEAREST, MInference
from kvplug.selection import Asking, Blocks, choose_pages

IMPLEMENTATION = "kvplug_calibrate"
TEXT = "Python's documentation (pydoc_data.topics)"
COLUMNS = 1000 / 7096
"""Of the tokens that a head reads by columns and diagonals, the paper's share of columns."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How heads are measured. Raises ValueError for numbers that measure nothing."""

    contexts: int = 4
    context: int = 4096
    """Tokens of each."""
    density: float = 0.125
    """Share of a context that each pattern reads."""
    sinks: int = 128
    window: int = 256
    page: int = 32
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("contexts", "context", "window", "page", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context % self.page or self.context % self.block:
            raise ValueError(
                f"a context must be whole pages of {self.page} and blocks of {self.block} tokens, "
                f"got {self.context}; write 4096"
            )
        if not 0 < self.density < 1:
            raise ValueError(f"density must be a share between 0 and 1, got {self.density}")
        if self.sinks < 0 or self.sinks + self.window >= self.context:
            raise ValueError(
                f"a context of {self.context} tokens has nothing outside sinks={self.sinks} and "
                f"window={self.window}; write a longer one, or smaller ones"
            )
        least = max(self.sinks + self.block, FIRST + NEAREST)
        if self.tokens < least:
            raise ValueError(
                f"density={self.density} of a context of {self.context} tokens are {self.tokens}, "
                f"and {least} are always read; raise the density or the context"
            )

    @property
    def tokens(self) -> int:
        """That a block reads by each pattern."""
        return round(self.density * self.context)

    def policy(self, pattern: str) -> MInference:
        columns = max(round(COLUMNS * self.tokens), FIRST)
        return MInference(
            pattern=pattern, vertical=columns, slash=max(self.tokens - columns, NEAREST),
            budget=self.tokens, sinks=self.sinks, block=self.block,
        )  # fmt: skip


def default_text() -> str:
    return "\n".join(topics[name] for name in sorted(topics))


class Measured:
    """Of one layer, sums over contexts."""

    def __init__(self, query_heads: int, heads: int) -> None:
        self.recall = {pattern: torch.zeros(query_heads) for pattern in PATTERNS}
        self.outside = torch.zeros(heads)
        self.changed, self.squared = torch.zeros(heads), torch.zeros(heads)
        self.contexts = 0

    def mean(self) -> Layer:
        def shares(each: Tensor) -> list[float]:
            return [min(max(value, 0.0), 1.0) for value in (each / self.contexts).tolist()]

        recall = {pattern: shares(each) for pattern, each in self.recall.items()}
        lost = self.changed / self.squared.clamp(min=torch.finfo(torch.float32).tiny)
        return Layer(
            recall=recall,
            outside=shares(self.outside),
            lost=shares(lost * self.contexts),  # a ratio of sums, not of a context
        )


class Calibration:
    """A model whose attention is measured as it is computed."""

    def __init__(self, setting: Setting, tell: Callable[[], object] = lambda: None) -> None:
        """tell: called with each layer that is done."""
        self.setting, self.tell = setting, tell
        self.layers: dict[int, Measured] = {}

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None, scaling: float | None = None,
        sliding_window: int | None = None, softcap: float | None = None,
        s_aux: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query [1, Hq, T, D], key, value [1, H, T, D] -> [1, T, Hq, D]"""
        (heads, tokens, dim), groups = query.shape[1:], key.shape[1]
        sees_all = getattr(module, "is_causal", True) and sliding_window is None
        layer: int | None = module.layer_idx if sees_all else None
        scale = dim**-0.5 if scaling is None else scaling
        grouped = query[0].view(groups, heads // groups, tokens, dim)
        out, pages = [], []
        outside, changed, squared = query.new_zeros(3, groups)
        for start in range(0, tokens, self.setting.block):
            rows = slice(start, start + self.setting.block)
            logits = grouped[:, :, rows] @ key[0, :, None].mT * scale  # [H, G, b, T]
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = _masked(logits, attention_mask, rows)
            if s_aux is None:
                shares = logits.softmax(-1)
            else:
                sinks = s_aux.float().view(groups, -1, 1, 1).expand(*logits.shape[:3], 1)
                shares = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
            answer = shares @ value[0, :, None]  # [H, G, b, D]
            out.append(answer.flatten(0, 1))
            if layer is not None:
                far, more = self._far(shares, start)
                without = (shares * ~far) @ value[0, :, None]
                without /= (1 - (shares * far).sum(-1, keepdim=True)).clamp(min=1e-9)
                changed += (answer - without).square().mul(more).sum((1, 2, 3))
                squared += answer.square().mul(more).sum((1, 2, 3))
                shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)
                pages.append(shares.unflatten(-1, (-1, self.setting.page)).sum(-1).mean(2))
                outside += (shares * far).sum((2, 3)).mean(1)
        if layer is not None:
            self._measure(layer, grouped, key[0], torch.stack(pages), outside, scale)
            self.layers[layer].changed += changed.cpu()
            self.layers[layer].squared += squared.cpu()
        self.tell()
        return torch.cat(out, 1).transpose(0, 1)[None].contiguous(), None

    def _far(self, shares: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Which tokens are neither first nor in a block's queries' windows, and which queries see
        any. [H, G, b, T] -> [b, T], [b, 1] bool"""
        at = torch.arange(shares.shape[-1], device=shares.device)
        last = at[start : start + shares.shape[2], None] - self.setting.window
        far = (at >= self.setting.sinks) & (at <= last)
        return far, far.any(1, keepdim=True)

    def _measure(
        self, layer: int, query: Tensor, key: Tensor, mass: Tensor, outside: Tensor, scale: float
    ) -> None:
        """query [H, G, T, D], key [H, T, D], mass [n, H, G, P]: of blocks' attention, by page"""
        setting, (H, G, T, _) = self.setting, query.shape
        n, P, width = T // setting.block, T // setting.page, -(-setting.tokens // setting.page)
        step = query.permute(2, 0, 1, 3)  # [T, H, G, D]
        keys = key.transpose(0, 1).unflatten(0, (P, setting.page)).contiguous()
        start = torch.arange(0, T, setting.block, device=key.device)
        seen = -(-(start + setting.block) // setting.page)  # pages
        table = torch.arange(P, dtype=torch.int32, device=key.device).expand(n, P).contiguous()
        choosing = seen > width
        measured = self.layers.setdefault(layer, Measured(H * G, H))
        measured.contexts += 1
        measured.outside += outside.cpu() / (T - setting.sinks - setting.window)
        for pattern in PATTERNS:
            policy = setting.policy(pattern)
            blocks = Blocks(
                size=setting.block, sinks=-(-setting.sinks // setting.page), rows=start,
                bounds=torch.arange(0, T + 1, setting.block, device=key.device).int(),
                start=start.int(), own=(seen - start // setting.page).int(),
                asking=_asking(policy.asks, n, T, key.device),
            )  # fmt: skip
            chosen, counts = choose_pages(
                policy, blocks, step, keys, None, table, seen.int(), seen.clamp(max=width).int(),
                width=width, scale=scale, step=step,
            )  # fmt: skip
            counted = torch.arange(width, device=key.device) < counts[..., None]
            index = chosen.long()[:, :, None].expand(n, H, G, width)
            found = (mass.gather(3, index) * counted[:, :, None]).sum(-1)  # [n, H, G]
            measured.recall[pattern] += found[choosing].mean(0).flatten().cpu()


def _masked(logits: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    """Of those queries. mask [1, 1, T, T], bool or to be added; None for what came before."""
    tokens = logits.shape[-1]
    if mask is None:
        at = torch.arange(tokens, device=logits.device)
        mask = (at <= at[:, None])[None, None]
    mask = mask[:, :, rows, :tokens]
    if mask.dtype is torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask


def _asking(most: int, blocks: int, tokens: int, device: torch.device) -> Asking:
    """The last queries of one prompt, all of whose blocks are there."""
    count = min(most, tokens)
    rows = torch.arange(tokens - most, tokens, device=device).clamp(min=tokens - count)
    return Asking(
        rows=rows[None],
        count=torch.tensor([count], dtype=torch.int32, device=device),
        seen=torch.tensor([tokens], dtype=torch.int32, device=device),
        block=torch.tensor([blocks - 1], device=device),
        run=torch.zeros(blocks, dtype=torch.int64, device=device),
    )


def contexts(tokens: Sequence[int], count: int, length: int, name: str) -> list[list[int]]:
    """Evenly spread over a text of that name. Raises ValueError where it is too short for them."""
    if len(tokens) < count * length:
        raise ValueError(
            f"{name} has {len(tokens):,} tokens of this model, and {count} contexts of "
            f"{length:,} need {count * length:,}; give a longer file, or write fewer --contexts "
            "or a shorter --context"
        )
    apart = len(tokens) // count
    return [list(tokens[number * apart :][:length]) for number in range(count)]


def calibrate(
    model: str,
    text: str | None = None,
    setting: Setting | None = None,
    *,
    device: str = "cpu",
    source: str = TEXT,
    tell: Callable[[int, int], object] = lambda done, all: None,
) -> Heads:
    """model: folder, or a name that transformers knows. text: Python's documentation without one.
    source: what to call it. tell: called with the layers that are done, over all contexts, and
    that there are.

    Raises ValueError for a model whose attention cannot be measured and for too short a text.
    """
    try:
        from transformers import (
            AttentionInterface,
            AttentionMaskInterface,
            AutoModel,
            AutoTokenizer,
            masking_utils,
        )
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise ValueError(
            f"calibrating needs {error.name}; install it with: pip install transformers"
        ) from None

    logging.set_verbosity_error()  # of weights that no attention needs, and texts longer than it
    setting = setting or Setting()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(default_text() if text is None else text).input_ids
    cut = contexts(ids, setting.contexts, setting.context, source)
    done, total = 0, 0

    def count() -> None:
        nonlocal done
        done += 1
        tell(done, max(total, done))

    running = Calibration(setting, count)
    AttentionInterface.register(IMPLEMENTATION, running.attend)
    AttentionMaskInterface.register(IMPLEMENTATION, masking_utils.eager_mask)
    try:
        loaded = AutoModel.from_pretrained(
            model, dtype=torch.float32, attn_implementation=IMPLEMENTATION
        )
    except ValueError as error:
        raise ValueError(f"kvplug cannot measure the attention of {model}: {error}") from None
    config = loaded.config.get_text_config()
    shape, total = Shape.of(config), config.num_hidden_layers * len(cut)
    loaded = loaded.eval().to(device)
    with torch.inference_mode():
        for each in cut:
            loaded(torch.tensor([each], device=device), use_cache=False)
    if not running.layers:
        raise ValueError(
            f"no layer of {model} ({shape}) attends to all that came before: there is nothing to "
            "calibrate"
        )
    layers = {number: each.mean() for number, each in running.layers.items()}
    for number, layer in layers.items():
        if (len(layer.recall[PATTERNS[0]]), len(layer.outside)) != (shape.heads, shape.kv_heads):
            raise ValueError(
                f"layer {number} of {model} has {len(layer.outside)} KV heads where its "
                f"configuration says {shape.kv_heads}: a file is of models whose layers have as "
                "many"
            )
    settings = {"text": source, **vars(setting)}
    return Heads(model=Path(model).name, shape=shape, settings=settings, layers=layers)
