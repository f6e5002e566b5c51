"""Says in an op's own axis letters what shape, dtype and device a tensor should have had."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32,)


class Shapes:
    """The axes of one call: the first tensor that names an axis fixes its length."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lengths: dict[str, int] = {}

    def __getitem__(self, axis: str) -> int:
        return self.lengths[axis]

    def check(
        self,
        name: str,
        tensor: Tensor,
        axes: str,
        dtypes: Sequence[torch.dtype],
        strided: bool = False,
    ) -> None:
        """Raises ValueError unless `tensor` is, say, [B, 2, D] for axes "B 2 D", and of a dtype.

        Its last axis must be contiguous, unless strided, and it must be on the device of the call.
        """
        letters = axes.split()
        wanted = [
            int(a) if a.isdigit() else self.lengths.setdefault(a, n)
            for a, n in zip(letters, tensor.shape, strict=False)
        ]
        if wanted != list(tensor.shape) or len(letters) != tensor.ndim:
            named = (a if a.isdigit() else f"{a}={self.lengths.get(a, '?')}" for a in letters)
            raise ValueError(f"{name} must be [{', '.join(named)}], got {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            choices = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            got = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be {choices}, got {got}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and not strided:
            raise ValueError(
                f"{name} must be contiguous in its last axis, got strides {list(tensor.stride())}"
            )

    def check_groups(self) -> None:
        """Raises ValueError unless the query heads Hq divide into the KV heads H."""
        if self["Hq"] % self["H"]:
            raise ValueError(
                f"query heads must be a multiple of the {self['H']} KV heads, got {self['Hq']}"
            )


def by_page(digest: Tensor) -> Tensor:
    """Digests [N, K, H, R, D] of blocks of K pages, or [N, H, R, D] of one each -> the former."""
    return digest.unsqueeze(1) if digest.ndim == 4 else digest


def rows_of(digest: Tensor, blocks: Tensor, start: int, stop: int) -> Tensor:
    """Of the pages from start to stop of a request whose blocks are named.

    digest [N, K, H, R, D], blocks [P] -> [stop - start, H, R, D]
    """
    page, K = torch.arange(start, stop, device=blocks.device), digest.shape[1]
    if K == 1:
        return digest[:, 0].index_select(0, blocks[start:stop])
    return digest[blocks[page // K].long(), page % K]


def check_page_size(page_size: int) -> None:
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1 token, got {page_size}")


def check_unit(unit: int | None, page_size: int) -> int:
    """Tokens of what is chosen, a page's unless said. Raises ValueError unless pages divide so."""
    if unit is None:
        return page_size
    if unit < 1 or page_size % unit:
        raise ValueError(f"unit must divide the {page_size} tokens of a page, got {unit}")
    return unit
