"""A request that a step compresses: what stays, and what memory it takes to find out.

The private slots it is packed into come from the scheduler (``kvplug_sglang.packing``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvplug import Offer, PromptKV, ScoredEviction, keep_tokens
from kvplug.batch import Kinds
from kvplug.head_pages import HeadPacking
from kvplug.policy import Positions
from kvplug_kernels.fp8 import bits
from kvplug_sglang.router import Tenant


@dataclass
class Packing:
    """A request whose kept tokens are packed in this step: T tokens, of which n stay."""

    scored: ScoredEviction
    protect: Sequence[tuple[int, int]]
    tenant: Tenant
    slots: Tensor
    """Where its tokens lie, in order. [T] int64"""
    targets: Tensor
    """Where those that stay go, in order. [n] int64"""
    era: int = 0
    """Of the event."""
    row: int = 0
    """Of the batch."""
    phase: int = 0
    """Of the step (``kvplug.schedule``)."""
    by_head: Mapping[tuple[bool, ...], HeadPacking] = field(default_factory=dict)
    """In layers whose heads are of such kinds, and keep different numbers of tokens."""

    def replaced(self, page_size: int) -> Tensor:
        """Slots of the last tokens of the prompt's whole pages, as many as stay. [n] int64"""
        end = len(self.slots) // page_size * page_size
        return self.slots[end - len(self.targets) : end]

    def kept(
        self, keys: Tensor, values: Tensor, window: Tensor | None, *, scale: float,
        first_head: int, page_size: int, by_head: HeadPacking | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What each KV head of a layer keeps, in the order of ``targets``.

        keys, values [T, H, D], window [W, Hq, D]: the queries of the last tokens -> [n, H, D]
        twice, copied; where heads keep different numbers of tokens, [N, D] twice, ``by_head``.
        Nothing synchronises.
        """
        prompt = PromptKV(
            keys=keys[None],
            values=values[None],
            queries=None if window is None else window.unflatten(1, (keys.shape[1], -1))[None],
            lengths=self.slots.new_full((1,), len(self.slots)),
            scale=scale,
            first_head=first_head,
            page_size=page_size,
            event=self.era,
        )
        if by_head is not None:
            tokens = keep_tokens(self.scored, prompt, by_head.keep, by_head.width, self.protect)
            return by_head.kept(prompt.keys, tokens), by_head.kept(prompt.values, tokens)
        width = len(self.targets)
        keep = self.slots.new_full((1,), width)
        tokens = keep_tokens(self.scored, prompt, keep, width, self.protect)
        index = tokens[0].T[..., None].expand(-1, -1, keys.shape[2])  # [n, H, D]
        kept = [bits(each[0]).gather(0, index) for each in (prompt.keys, prompt.values)]
        return kept[0].view(keys.dtype), kept[1].view(values.dtype)


def packing_bytes(offer: Offer, model: Any, ranks: int, page_size: int, dtype: torch.dtype) -> int:
    """The most that packing the longest prompt takes on one rank beside the pool, by each policy
    that a request may have: done once, on tensors without memory. dtype: of the pool.

    Prompts are packed one at a time, and layer by layer.
    """
    policy, longest = offer.settings.policy, model.context_len
    layers = model.num_hidden_layers
    most = max(offer.max_tokens, *([] if policy.uniform else policy.layer_budgets(layers)), 0)
    kept = min(-(-most // page_size), longest // page_size) * page_size
    shape = longest, model.get_num_kv_heads(ranks), model.head_dim
    cache = torch.empty(shape, dtype=dtype, device="meta")
    found = [0]

    def numbers(values: Positions) -> Tensor:
        return torch.empty(values.shape, dtype=torch.int64, device="meta")

    for scored, kinds, layer in _kinds(offer, layers):
        by_head = HeadPacking.by_kinds(
            scored, [] if kinds is None else [kinds], longest // page_size,
            numbers(np.arange(kept // page_size)), page_size, numbers,
        )  # fmt: skip
        packing = Packing(
            scored=scored,
            protect=offer.settings.protect,
            tenant=Tenant(0, longest),
            slots=numbers(np.arange(longest)),
            targets=numbers(np.arange(kept)),
        )
        window, windows = None, 0
        if scored.needs_queries:
            heads = model.num_attention_heads // ranks
            window = cache.new_empty(scored.window, heads, model.head_dim, dtype=model.dtype)
            windows = layers * window.nbytes
        with Taken() as taken:
            try:
                prompt = cache[packing.slots], cache[packing.slots]
                packing.kept(
                    *prompt, window, scale=1.0, first_head=layer * shape[1], page_size=page_size,
                    by_head=None if kinds is None else by_head[kinds],
                )  # fmt: skip
            except RuntimeError as error:
                raise ValueError(
                    f"what {scored.name}.score takes of memory could not be found out on "
                    f"PyTorch's meta device ({error}); write it in operations that read no "
                    "tensor's value"
                ) from error
        found.append(taken.most + windows)
    return max(found)


def _kinds(offer: Offer, layers: int) -> Iterator[tuple[ScoredEviction, Kinds, int]]:
    """The scorers that a request may have, in a layer of each of the kinds that its heads are."""
    for scored in offer.scorers:
        for kinds, layer in {scored.kinds(n): n for n in range(layers)}.items():
            yield scored, kinds, layer


class Taken(TorchDispatchMode):
    """Bytes of the tensors that are made within: ``most`` of them at once, on whatever device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {each.untyped_storage() for each in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for each in _tensors(result):
            storage = each.untyped_storage()
            if storage not in given and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]
