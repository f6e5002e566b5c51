"""What a policy costs: bytes as the engine allocates them, tokens as a step reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvplug.config import Settings
from kvplug.plan import Planner
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
    """Decode work of one step, summed over its queries; tokens are means over the layers."""

    queries: int
    cached: float
    """Tokens behind the queries: what dense attention would read."""
    read: float
    scanned: float = 0.0
    """Tokens of the pages whose digests were read."""

    def bytes(self, token: float, digest: float) -> tuple[float, float]:
        """What dense attention would read in a layer, and what is read, digests included.

        token: bytes of one in the layer's cache; digest: its share of what its page carries.
        """
        return self.cached * token, self.read * token + self.scanned * digest


def step_reads(
    segments: Segments, planner: Planner, budgets: Sequence[int | float | None]
) -> StepReads:
    """budgets: what each planned layer may read, None for everything (``layer_budget``).

    A selection by mass may read less than this: the bound is what the host knows.
    """
    decode = segments.where(segments.decodes)
    spared = scanned = 0.0
    if planner.selector is not None and budgets:
        selecting = decode.where(decode.selects)
        units = -(-selecting.visible // planner.unit)
        for budget in budgets:
            if budget is not None:
                spared += float((units - planner.reads(selecting.visible, budget)).sum())
                scanned += float((-(-selecting.visible // planner.page)).sum())
        spared *= planner.unit / len(budgets)
        scanned *= planner.page / len(budgets) if planner.selector.digest else 0.0
    # A segment of several queries grows by one token a query.
    triangle = decode.queries * (decode.queries - 1) / 2
    return StepReads(
        queries=int(decode.queries.sum()),
        cached=float((decode.stop * decode.queries - triangle).sum()),
        read=float((decode.visible * decode.queries - triangle).sum()) - spared,
        scanned=scanned,
    )


def reads_by_policy(
    segments: Segments, planners: Sequence[Planner], layers: Iterable[int]
) -> Iterator[tuple[Settings, StepReads]]:
    """What each of a batch's settings cost in a step; layers: numbers of the planned ones."""
    for choice, part in segments.by_choice().items():
        planner = planners[choice]
        budgets = [planner.layer_budget(layer) for layer in layers]
        yield planner.settings, step_reads(part, planner, budgets)
