"""A page's format: which bytes hold its keys and values, and what they say without being read.

A policy line without one leaves pages plain: the numbers that the engine keeps, digests behind
them. A format is the server's: every request's pages have it, whatever else the line plans.

The page that is being filled stays plain, and is coded once, when its last token is there. A query
at position p sees the pages before its own as they were coded, and the tokens of its own as they
were: so what it sees depends on its position alone, however the prompt was cut into chunks, and
coded pages serve whoever has the same prefix.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplug.policy import Action, Evidence, Granularity, Policy, Stage
from kvplug_kernels.key_codes import code_rows, update_key_codes
from kvplug_kernels.page_layout import PageLayout


@dataclass(frozen=True)
class KeyCodes:
    """A full page's keys in few bits, per channel."""

    accumulates: ClassVar[bool] = False

    bits: int

    def rows(self, page_size: int, itemsize: int) -> int:
        return code_rows(page_size, self.bits, itemsize)

    def update(self, digest: Tensor, keys: Tensor, slots: Tensor, cached: Tensor) -> None:
        update_key_codes(digest, cached, slots, self.bits)


@dataclass(frozen=True, kw_only=True)
class PageFormat(Policy):
    """Keeps all tokens, in other bytes."""

    stage = Stage.COMPRESS
    action = Action.PLACEMENT
    granularity = Granularity.PAGE
    evidence = Evidence.KEYS_AND_VALUES
    query_agnostic = True

    @property
    @abstractmethod
    def codes(self) -> KeyCodes:
        """What a full page says of its keys: the bytes that hold them."""

    @property
    def apart(self) -> int:
        """Of a model's layers so many, the first ones, have other codes than the rest, whose
        ``codes`` are."""
        return 0

    def in_layer(self, layer: int) -> PageFormat:
        """The format of one layer, of which a model's first is 0; all of them alike."""
        return self

    @abstractmethod
    def layout(self, page_size: int, head_size: int, dtype: torch.dtype) -> PageLayout:
        """Of a KV head's page, where all layers are alike (``in_layer``). dtype: of the plain
        numbers. Raises ValueError for pages that it cannot code, with what to write instead."""

    def layouts(
        self, layers: int, page_size: int, head_size: int, dtype: torch.dtype
    ) -> list[PageLayout]:
        """As ``layout``, of each of a model's layers."""
        return [self.in_layer(n).layout(page_size, head_size, dtype) for n in range(layers)]
