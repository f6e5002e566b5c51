"""The requests that hold memory, by their ids: where a batch's rows find their policy.

Attributes of a ForwardBatch do not survive SGLang's copies of it, its ``rids`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvplug import Course

OWN = 0
"""The choice of a request that says nothing: the server's own settings."""


@dataclass(eq=False)
class Tenant:
    """A request that holds a row of the pool."""

    choice: int
    """The number of its settings."""
    prompt: int
    """Tokens of the original prompt, also after a retraction."""
    private: int = 0
    """Pages that hold, or will hold, what is kept; 0 while it has none."""
    course: Course | None = None
    """When it is packed into them; None while it has none."""
    slots: Tensor | None = None
    """The private pages' slots, in order, until they stand in the request's row. [K] int64"""
    swapped: bool = False
    shared: bool = True
    """Whether SGLang would have inserted the request into its tree."""
    row: int = -1
    """Of the pool."""
    evicts: bool = False
    """Whether it may lose pages by position alone."""
    freed: list[tuple[int, int]] = field(default_factory=list)
    """Token ranges that returned to the pool while the request lived on."""
    window: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By layer and the era of an event, the queries of the last tokens before. [W, Hq, D]"""

    def free(self, begin: int, end: int) -> None:
        """A token range is back in the pool."""
        if self.freed and self.freed[-1][1] == begin:
            begin = self.freed.pop()[0]
        self.freed.append((begin, end))


class Router:
    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}
        self.pages = torch.zeros(1, 1, dtype=torch.int32)
        """Private pages of the request in each row of the pool. [rows, width]"""

    def serve(self, rows: int, width: int, device: torch.device) -> None:
        """Make room for a pool of so many rows, and so many private pages in each. The table
        stays where it is: CUDA graphs read it.
        """
        self.pages = torch.zeros(rows, width, dtype=torch.int32, device=device)

    @property
    def choices(self) -> list[int]:
        """The numbers of the tenants' settings."""
        return [tenant.choice for tenant in self.tenants.values()]

    def enter(self, rid: str, tenant: Tenant) -> None:
        self.tenants[rid] = tenant

    def in_row(self, row: int) -> Tenant | None:
        """Who holds a row of the pool."""
        return next((t for t in self.tenants.values() if t.row == row), None)

    def leave(self, rid: str) -> Tenant | None:
        return self.tenants.pop(rid, None)

    def of(self, rids: Sequence[str]) -> list[Tenant]:
        """The batch's requests, in order. A row without its state would read garbage."""
        missing = [rid for rid in rids if rid not in self.tenants]
        assert not missing, f"requests {missing} run without a policy"
        return [self.tenants[rid] for rid in rids]

    def settle(self, row: int, pages: Tensor) -> None:
        """Note where a request's private pages are."""
        self.pages[row, : len(pages)] = pages.to(self.pages.dtype)
