"""Requests at once: vLLM's own count of blocks, from a model's shape and a policy.

A block holds S tokens of the layers of one group. With m_g blocks of a request in group g,

    blocks = memory // (layers of a group * bytes of a layer's page)
    requests at once = blocks / sum over groups of m_g

Layers with a window, those that a policy makes local and those of different budgets each have
groups of their own, equally many layers in each; a page that carries a digest is larger by
``Offer.digest_rows``; in a format it has its layout's bytes, rounded up to whole ones a token, and
the page that a request is filling takes as many blocks besides as hold it plain. m_g is the
planner's own: ``most_pages`` of what evicts, ``Schedule``'s of what packs, and without either the
length in blocks.

SGLang counts slots of tokens instead; the bytes are the same but for windows, whose layers it
keeps in the common pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from kvplug.accounting import digest_bytes
from kvplug.advice.model import Layer, Model
from kvplug.composition import Composition
from kvplug.offer import Offer
from kvplug.plan import Planner
from kvplug_kernels.page_layout import PageLayout

FLOATS = {2: torch.bfloat16, 4: torch.float32}
"""By bytes of a number."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Layers of one kind, which vLLM puts into groups together."""

    layers: int
    page: int
    """Bytes of a block in one of them."""
    most: int
    """Blocks that a request holds in one of their groups, at most."""
    settled: int
    """The same once its prompt is done."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Of a pool of so many bytes."""

    blocks: int
    """Of the pool."""
    most: int
    """That a request of full length holds at once, in all groups."""
    settled: int
    """The same once its prompt is done and packed."""
    block_bytes: int
    exact: bool
    """Whether it is the engine's own count; beside recurrent layers, whose states vLLM fits
    blocks to, it is a ratio of bytes."""

    @property
    def requests(self) -> float:
        """What vLLM's start-up line says."""
        return self.blocks / self.most

    @property
    def together(self) -> int:
        """Requests that are served at once, of which one is in its prompt and the others behind
        it."""
        if self.most > self.blocks:
            return 0
        return 1 + (self.blocks - self.most) // max(1, self.settled)


def capacity(
    model: Model,
    offer: Offer,
    memory: float,
    *,
    block_size: int,
    prompt: int,
    tokens: int,
    in_flight: int,
    itemsize: int | None = None,
) -> Capacity:
    """memory: bytes of the pool. prompt, tokens: of a request, and of it with its answer.
    in_flight: tokens that are computed at once. itemsize: of a number in the cache.

    Raises ValueError for pages that a format cannot code.
    """
    size = itemsize or model.itemsize
    shape = _Shape(model, offer, block_size, prompt, tokens, in_flight, size)
    buckets = shape.buckets()
    counts = [bucket.layers for bucket in buckets]
    each = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    block = each * max(bucket.page for bucket in buckets)
    if shape.alike:  # one group, whatever its layers weigh
        block = sum(bucket.layers * bucket.page for bucket in buckets)
        buckets, counts, each = buckets[:1], [1], 1
    groups = [-(-count // each) for count in counts]
    most = sum(n * bucket.most for n, bucket in zip(groups, buckets, strict=True))
    settled = sum(n * bucket.settled for n, bucket in zip(groups, buckets, strict=True))
    most, settled = most + shape.open_blocks, settled + shape.open_blocks
    states = sum(layer.state for layer in model.layers)
    if states:
        states_blocks = -(-states // block)
        most, settled = most + states_blocks, settled + states_blocks
    return Capacity(
        blocks=int(memory // block) - shape.directory, most=most, settled=settled,
        block_bytes=block, exact=not states,
    )  # fmt: skip


def coded(layer: Layer, offer: Offer, page_size: int, itemsize: int) -> PageLayout | None:
    """Of a KV head's page where a format has them. Raises ValueError for pages that it cannot
    code."""
    if offer.format is None:
        return None
    format = offer.format.in_layer(layer.number)
    return format.layout(page_size, layer.head_dim, FLOATS[itemsize])


class Kind(NamedTuple):
    """What layers have in common that vLLM puts into one group."""

    window: int | None
    budget: int | None
    page: int


def as_planned(
    model: Model, policy: Composition
) -> Iterator[tuple[Layer, int | None, int | None]]:
    """Each layer that attends, the window that it has, the model's own or the policy's, and the
    tokens that it keeps of a prompt where layers differ in that."""
    attention = model.attention
    local: dict[int, int] = {}
    if policy.local is not None:
        numbers = policy.local.local_layers(len(attention))
        local = {attention[n].number: policy.local.window for n in numbers}
    planned = [x.number for x in model.planned if x.number not in local]
    budgets: tuple[int | None, ...] = (None,) * len(planned)
    if not policy.uniform:
        budgets = policy.layer_budgets(len(planned))
    own = dict(zip(planned, budgets, strict=True))
    for layer in attention:
        yield layer, layer.window or local.get(layer.number), own.get(layer.number)


@dataclass(frozen=True)
class _Shape:
    model: Model
    offer: Offer
    size: int
    prompt: int
    tokens: int
    in_flight: int
    itemsize: int

    @cached_property
    def kinds(self) -> Counter[Kind]:
        """Of layers that have a cache, and how many there are of each."""
        found: Counter[Kind] = Counter()
        for layer, window, budget in as_planned(self.model, self.offer.settings.policy):
            if layer.owns:
                found[Kind(window, budget, self._page(layer, window))] += 1
        return found

    @property
    def alike(self) -> bool:
        """Whether all keep equally many tokens, and so share a group."""
        return len({(kind.window, kind.budget) for kind in self.kinds}) == 1

    def buckets(self) -> list[Bucket]:
        widest = max(kind.page for kind in self.kinds)
        found = []
        for kind, layers in self.kinds.items():
            # vLLM gives smaller pages more tokens, or pads them.
            more = widest // kind.page if widest % kind.page == 0 and not self.alike else 1
            page = kind.page if self.alike else widest
            most, settled = self._held(kind, self.size * more)
            found.append(Bucket(layers=layers, page=page, most=most, settled=settled))
        return found

    @property
    def directory(self) -> int:
        """Blocks that say what lies on the host, where prompts go there."""
        return Planner(self.offer.settings, self.size).schedule.directory

    @property
    def open_blocks(self) -> int:
        """Of the page that a request is filling, where full ones are coded."""
        found = (
            coded(each, self.offer, self.size, self.itemsize) for each in self.model.attention
        )
        return max((layout.plain_pages for layout in found if layout), default=0)

    def _page(self, layer: Layer, window: int | None) -> int:
        """Bytes of a block in a layer, its digest included."""
        if layout := coded(layer, self.offer, self.size, self.itemsize):
            return layer.kv_heads * layout.token_bytes * self.size
        page = self.model.token_bytes(layer, self.itemsize) * self.size
        if window is not None:
            return page
        pages, rows = self.offer.digest_rows(self.size, self.itemsize)
        return page + digest_bytes(pages * rows, layer.kv_heads, layer.head_dim, self.itemsize)

    def _held(self, kind: Kind, size: int) -> tuple[int, int]:
        """Blocks of so many tokens that a request holds in a layer, at most and in the end."""
        if kind.window is not None:
            seen = (min(kind.window - 1 + n, self.tokens) for n in (self.in_flight, 1))
            most, settled = (-(-count // size) + 1 for count in seen)
            return most, settled
        planner = Planner(self.offer.settings, size, kind.budget)
        schedule, whole = planner.schedule, -(-self.tokens // size)
        if planner.eviction is not None or schedule.appends:
            most, settled = (planner.most_pages(n, self.tokens) for n in (self.in_flight, 1))
            return most, settled
        if not schedule.packs:
            return whole, whole
        most = schedule.most_pages(self.prompt, self.in_flight, self.tokens)
        later = schedule.most_pages(self.prompt, 1, self.tokens, since=self.prompt + 1)
        if schedule.placement is not None and (private := schedule.course(self.prompt).private):
            listed = private - schedule.placement.pages  # blocks that are none of the pool's
            most, later = most - listed, later - listed
        return most, later or most
