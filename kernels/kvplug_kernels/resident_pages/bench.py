"""python -m kvplug_kernels.resident_pages.bench"""

import torch
from torch import Tensor

from kvplug_kernels.decode_shapes import DecodeInputs
from kvplug_kernels.graph_timing import Case, print_case
from kvplug_kernels.host_memory import host_memory
from kvplug_kernels.resident_pages import EMPTY, resident_pages

RUNS = 4096
"""Pages that the host has: more than any cache holds of it."""


def case(inputs: DecodeInputs) -> Case:
    """Of what each head chose an eighth is not there, as between two steps of a spike's model."""
    return _case("resident_pages", inputs, 8)


def there_case(inputs: DecodeInputs) -> Case:
    """All is there: what finding that out takes."""
    return _case("resident_there", inputs, 0)


def _case(name: str, inputs: DecodeInputs, each: int) -> Case:
    """Of every so many chosen pages one is missing."""
    shape, keys = inputs.shape, inputs.keys
    B, H, S, K, C = shape.B, shape.H, shape.S, shape.kept_pages, 2 * shape.D
    device = keys.device
    cache = torch.zeros(B * K, H, S, C, device=device, dtype=keys.dtype)
    host = host_memory((min(RUNS, B * shape.pages), H, S, C), keys.dtype, device).zero_()
    rows = torch.arange(B * shape.pages, device=device, dtype=torch.int32) % len(host)
    hot = torch.randperm(B * K, device=device).int().view(B, K)
    away = torch.full((B,), shape.pages - 1, device=device, dtype=torch.int32)
    known = inputs.chosen.clone()
    missing = torch.zeros(K, dtype=torch.bool, device=device)
    if each:
        missing[::each] = True
    known[..., missing] = EMPTY
    held = torch.full((B * K, H), EMPTY, device=device, dtype=torch.int32)
    at = hot.long()

    def call() -> Tensor:
        held[at] = known.transpose(1, 2)
        return resident_pages(
            cache, held, host, rows.view(B, -1), hot, away, inputs.chosen, inputs.counts,
            torch.full_like(away, K),
        )  # fmt: skip

    moved = 2 * B * H * int(missing[: K - 1].sum()) * S * C * cache.element_size()
    return Case(name, call, max(moved, inputs.chosen.numel() * 4))


if __name__ == "__main__":
    print_case(case)
    print_case(there_case)
