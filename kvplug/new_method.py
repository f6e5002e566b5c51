"""``kvplug new-method NAME``: a package of one policy, its test and its entry point, that runs."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

POLICY = '''\
"""CLASS: read the pages whose mean key the query points at. Write your formula here.

    s_p = max over a KV head's query heads of q . (mean of the keys of page p)

Authors, "Title", year, https://arxiv.org/abs/0000.00000

Differs from the paper: say how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvplug import Evidence, Selector


@dataclass(frozen=True)
class MeanKey:
    """What a page says of its keys without being read: their mean, for each KV head."""

    accumulates: ClassVar[bool] = False

    def rows(self, page_size: int, itemsize: int) -> int:
        return 1  # vectors of D; the engine's pages grow by them

    def update(self, digest: Tensor, keys: Tensor, slots: Tensor, cached: Tensor) -> None:
        """digest [N, H, 1, D], cached [N, S, H, D]: new keys lie there already, at slots [tokens]
        (page * S + offset, negative for padding). A page is written anew by each of its keys."""
        pages = (slots // cached.shape[1]).clamp(min=0)
        digest[pages, :, 0] = cached[pages].float().mean(1).to(digest.dtype)


@dataclass(frozen=True, kw_only=True)
class CLASS(Selector):
    name = "NAME"
    evidence = Evidence.CURRENT_QUERY
    reads = "budget, plus a mean key per page"
    paper = "https://arxiv.org/abs/0000.00000"

    # Your knobs are fields: `NAME(budget=1024, sharp=2.0)` sets them.
    sharp: float = 1.0

    @property
    def digest(self) -> MeanKey:
        return MeanKey()

    def score(
        self,
        query: Tensor,
        digest: Tensor | None,
        page_table: Tensor,
        pages: Tensor,
        page_size: int,
    ) -> Tensor:
        """query [B, H, G, D], digest [N, H, 1, D], page_table [B, P], pages [B] -> [B, H, P]:
        higher is read. Columns beyond ``pages`` hold stale ids: never read them."""
        assert digest is not None
        counts = torch.arange(page_table.shape[1], device=query.device) < pages[:, None]
        means = digest[page_table.long().masked_fill(~counts, 0), :, 0]  # [B, P, H, D]
        scores = torch.einsum("bhgd,bphd->bhgp", query.float(), means.float()).amax(2)
        return (self.sharp * scores).masked_fill(~counts[:, None], -torch.inf)
'''

TEST = '''\
"""CLASS against its formula, through the core as engines call it."""

import torch
from kvplug import choose_units

from NAME import CLASS

S, PAGES, H, G, D = 16, 12, 2, 3, 8


def test_the_pages_that_are_read_are_those_of_the_formula():
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(PAGES, S, H, D, generator=random)
    query = torch.randn(1, H, G, D, generator=random)
    policy = CLASS(budget=5 * S)
    digest = torch.zeros(PAGES, H, policy.digest.rows(S, 4), D)
    policy.digest.update(digest, keys.flatten(0, 1), torch.arange(PAGES * S), keys)

    chosen, counts = choose_units(
        policy, query, digest, torch.arange(PAGES, dtype=torch.int32)[None],
        torch.tensor([PAGES], dtype=torch.int32), torch.tensor([PAGES * S], dtype=torch.int32),
        torch.tensor([5], dtype=torch.int32), page_size=S, width=5, scale=D**-0.5,
    )

    assert counts.tolist() == [[5, 5]]
    for head in range(H):
        worth = [float((query[0, head] @ page[:, head].mean(0)).max()) for page in keys[:-1]]
        best = sorted(range(PAGES - 1), key=lambda page: -worth[page])[:4]
        assert chosen[0, head].tolist() == [*sorted(best), PAGES - 1]


def test_its_line_parses_back():
    from kvplug import parse, policy_names

    if "NAME" in policy_names():  # after pip install -e .
        assert parse(str(parse("NAME(budget=64)"))) == parse("NAME(budget=64)")
'''

PROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "HYPHENED"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["kvplug"]

[project.entry-points."kvplug.policies"]
NAME = "NAME:CLASS"

[tool.hatch.build.targets.wheel]
include = ["NAME.py"]

[tool.pytest.ini_options]
pythonpath = ["."]
"""


def write(name: str, folder: Path) -> list[Path]:
    """A package of one policy of that name in a new folder. -> its files

    Raises ValueError for what is no name of a policy, and where the folder is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"a method's name is written in lower-case letters, digits and underscores, and no "
            f"word of Python's, got {name!r}; write my_method"
        )
    if folder.exists():
        raise ValueError(f"{folder} is there already; write another name, or --out FOLDER")
    words = {
        "CLASS": "".join(part.capitalize() for part in name.split("_")),
        "NAME": name,
        "HYPHENED": name.replace("_", "-"),
    }
    files = {f"{name}.py": POLICY, f"test_{name}.py": TEST, "pyproject.toml": PROJECT}
    folder.mkdir(parents=True)
    for file, text in files.items():
        filled = re.sub(r"\b(CLASS|NAME|HYPHENED)\b", lambda found: words[found.group()], text)
        (folder / file).write_text(filled.replace("test_NAME", f"test_{name}"))
    return [folder / file for file in files]
