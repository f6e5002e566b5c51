"""What fills the stage compress by moving a prompt elsewhere: to host memory, page by page.

Nothing is forgotten. When a prompt ends its whole pages are written to the host; its request keeps
private pages in their place, as a packed one does (``kvplug.schedule``): a few *hot* ones, which
hold what a step has chosen, head by head, and behind them the *directory*, which holds what its
pages say of their keys. Every page can be chosen at every step, and is brought into a hot one
unless it is there.

A directory's page holds as many digests as fit into it: where a page of S tokens is followed by a
digest of r vectors of D for each KV head, 2 S / r and the one that would be its own. So a digest
has one number in all of the directory, and that is the place on the host of the page that it
speaks of: nobody has to say which rows of host memory a request has.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from kvplug.load import Selector, TokenSelector
from kvplug.policy import LIMIT, Action, Evidence, Granularity, Policy, Stage


@dataclass(frozen=True, kw_only=True)
class Placement(Policy):
    """Keeps all of a prompt, and little of it where attention reads."""

    stage = Stage.COMPRESS
    action = Action.PLACEMENT
    granularity = Granularity.PAGE
    evidence = Evidence.NONE
    query_agnostic = True
    memory = "pages and digests, plus the answer; all tokens on the host"
    reads = "what the selector beside it reads"

    pages: int = 64
    """Hot pages of a request, per layer: at least as many as a step chooses."""
    room: int = 131072
    """Tokens that host memory holds of all requests, rounded up to whole pages of a directory."""

    def __post_init__(self) -> None:
        for name, of, default in (("pages", "pages", 64), ("room", "tokens", 131072)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and 1 <= value < LIMIT):
                raise ValueError(
                    f"{self.name}: {name} must be a number of {of}, at least 1, got {value!r}; "
                    f"write {self.name}({name}={default})"
                )

    def check_beside(self, selector: Policy | None, others: list[Policy]) -> None:
        """Raises ValueError for a line that says otherwise which pages are read, or that the
        tokens of a prompt's pages be at hand."""
        if others:
            raise ValueError(
                f"{self.name} was never run beside {others[0].name}; leave {others[0].name} out: "
                f"write {self} + {_example(selector)}"
            )
        if not isinstance(selector, Selector):
            raise ValueError(
                f"{self.name} leaves a prompt on the host, of which attention reads what is "
                f"chosen, and {self} names nothing that chooses; write {self} + {_example(None)}"
            )
        digest = selector.digest
        if isinstance(selector, TokenSelector) or digest is None or not digest.accumulates:
            raise ValueError(
                f"{selector.name} does not choose whole pages by digests that it keeps apart from "
                f"their keys, which {self.name} leaves on the host; write {self} + "
                f"{_example(None)}"
            )
        if isinstance(selector.budget, float):
            raise ValueError(
                f"{selector.name}: a share of the context, {selector.budget}, grows past the "
                f"{self.pages} hot pages of {self}; write a number of tokens: {self} + "
                f"{_example(None)}"
            )
        if selector.layer_budget(0) is None:
            raise ValueError(
                f"{selector}: its first layers read everything, which {self.name} leaves on the "
                f"host; write {self} + {selector.name}(budget={selector.budget}, dense_layers=0)"
            )

    def digests(self, selector: Selector, page_size: int) -> int:
        """In a page of the directory. Raises ValueError where pages do not fit the line."""
        if selector.page(page_size) != page_size:
            raise ValueError(
                f"{self} moves the pages that {selector.name} chooses, of "
                f"{selector.page(page_size)} tokens, and blocks have {page_size}; write "
                f"--block-size {selector.page(page_size)}"
            )
        units = max(-(-int(selector.budget) // page_size), selector.least(page_size))
        if units > self.pages:
            raise ValueError(
                f"{selector} reads {units} pages of {page_size} tokens in a step, and {self} has "
                f"room for {self.pages}; write {self.name}(pages={units}), or a smaller budget"
            )
        assert selector.digest is not None
        rows = selector.digest.rows(page_size, 4)
        assert 2 * page_size % rows == 0, f"digests of {rows} rows lie across pages"
        return 2 * page_size // rows + 1

    def directory(self, digests: int, page_size: int) -> int:
        """Pages of it, of so many digests each, that speak for all that the host holds."""
        pages = ceil(self.room / page_size)
        return ceil(pages / digests)


def _example(selector: Policy | None) -> str:
    return str(selector or "quest(budget=1024, dense_layers=0)")
