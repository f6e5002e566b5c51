"""What a policy costs: bytes as the engine allocates them, tokens as a step reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvplug.config import Settings
from kvplug.plan import Planner
from kvplug.policy import Positions
from kvplug.segments import Segments


class Labels:
    """What counters are kept by. Requests may name any number of policies, a scraper may not."""

    MOST = 100
    REST = "others"

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, label: str) -> str:
        """The label itself for the first ``MOST`` there are, ``REST`` for all that come later."""
        if label not in self._known:
            if len(self._known) == self.MOST:
                return self.REST
            self._known.add(label)
        return label


def digest_bytes(rows: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that a page grows by so that its digest lies behind its tokens."""
    return rows * kv_heads * head_dim * itemsize


def byte_share(tokens: int, budget: int | float, page_size: int, rows: float = 2) -> float:
    """Bytes that a selecting step must read, as a share of dense: digests and the selection.

    budget: tokens, or a share of them. A page of S tokens holds 2 S vectors of D (keys and values)
    and ``rows`` of digest, so the share is rows / 2S + budget / tokens (METHODS: 1/S + K/n for
    minimum and maximum).
    """
    share = budget if isinstance(budget, float) else budget / tokens
    return rows / (2 * page_size) + min(1.0, share)


@dataclass(frozen=True, kw_only=True)
class StepReads:
    """Work of one step, summed over its queries that decode; tokens are means over the layers.
    Those of prompts are counted apart."""

    queries: int
    cached: float
    """Tokens behind the queries: what dense attention would read."""
    read: float
    scanned: float = 0.0
    """Tokens of the pages whose digests were read."""
    prefill: StepReads | None = None
    """The same of prompts' queries; None in itself."""

    def bytes(self, token: float, digest: float) -> tuple[float, float]:
        """What dense attention would read in a layer, and what is read, digests included.

        token: bytes of one in the layer's cache; digest: its share of what its page carries.
        """
        return self.cached * token, self.read * token + self.scanned * digest


def step_reads(
    segments: Segments, planner: Planner, budgets: Sequence[int | float | None]
) -> StepReads:
    """budgets: what each planned layer may read as it decodes, None for everything
    (``layer_budget``).

    A selection by mass may read less than this: the bound is what the host knows.
    """
    blocks = planner.blocks
    of_prompts = [blocks.budget if blocks else None] * len(budgets)
    prefill = _reads(segments.where(~segments.decodes), planner, False, of_prompts)
    decode = _reads(segments.where(segments.decodes), planner, True, budgets)
    return replace(decode, prefill=prefill)


def _reads(
    segments: Segments, planner: Planner, decodes: bool, budgets: Sequence[int | float | None]
) -> StepReads:
    spared = scanned = 0.0
    chooser = planner.chooser(decodes)
    if chooser is not None and budgets:
        selecting = segments.where(segments.selects)
        page, unit = planner.grain(decodes)
        for budget in budgets:
            if budget is not None:
                keep = (
                    planner.reads(selecting.visible, budget)
                    if decodes
                    else planner.selection(selecting)
                )
                left = -(-selecting.visible // unit) - keep
                spared += float((left * selecting.queries).sum())
                scanned += float((-(-selecting.visible // page)).sum())
        spared *= unit / len(budgets)
        scanned *= page / len(budgets) if chooser.digest else 0.0
    # A segment of several queries grows by one token a query.
    triangle = segments.queries * (segments.queries - 1) / 2
    return StepReads(
        queries=int(segments.queries.sum()),
        cached=float((segments.stop * segments.queries - triangle).sum()),
        read=float((segments.visible * segments.queries - triangle).sum()) - spared,
        scanned=scanned,
    )


def dense_reads(computed: Positions, total: Positions, prompt: Positions) -> StepReads:
    """Of a step without a plan: each query reads all up to itself. [B] each"""
    begin, end = np.maximum(computed, prompt), np.minimum(total, prompt)
    return replace(_whole(begin, total), prefill=_whole(computed, end))


def _whole(begin: Positions, end: Positions) -> StepReads:
    queries = np.maximum(end - begin, 0)
    cached = float((queries * (begin + 1 + end)).sum()) / 2
    return StepReads(queries=int(queries.sum()), cached=cached, read=cached)


def reads_by_policy(
    segments: Segments, planners: Sequence[Planner], layers: Iterable[int]
) -> Iterator[tuple[Settings, StepReads]]:
    """What each of a batch's settings cost in a step; layers: numbers of the planned ones."""
    for choice, part in segments.by_choice().items():
        planner = planners[choice]
        budgets = [planner.layer_budget(layer) for layer in layers]
        yield planner.settings, step_reads(part, planner, budgets)
