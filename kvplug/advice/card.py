"""What a machine has: memory, bandwidth and arithmetic, as its vendor states them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kvplug.registry import did_you_mean

GiB = 1 << 30
UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """Of one accelerator; of several in tensor parallelism, of each."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    arithmetic: float | None = None
    """Dense multiplications and additions in 16 bits, a second; None where nobody says."""


# Memory as nvidia-smi and rocm-smi show it, the rest as in the vendors' data sheets, without
# sparsity.
CARDS = {
    card.name: card
    for card in (
        Card(name="h100", memory=79.6 * GiB, bandwidth=3.35e12, arithmetic=989e12),
        Card(name="h100-pcie", memory=79.6 * GiB, bandwidth=2.0e12, arithmetic=756e12),
        Card(name="h200", memory=140.4 * GiB, bandwidth=4.8e12, arithmetic=989e12),
        Card(name="b200", memory=179 * GiB, bandwidth=8.0e12, arithmetic=2250e12),
        Card(name="a100", memory=80 * GiB, bandwidth=2.04e12, arithmetic=312e12),
        Card(name="a100-40", memory=40 * GiB, bandwidth=1.55e12, arithmetic=312e12),
        Card(name="l40s", memory=45 * GiB, bandwidth=0.864e12, arithmetic=362e12),
        Card(name="l4", memory=22.5 * GiB, bandwidth=0.3e12, arithmetic=121e12),
        Card(name="a10g", memory=22.5 * GiB, bandwidth=0.6e12, arithmetic=70e12),
        Card(name="rtx4090", memory=24 * GiB, bandwidth=1.008e12, arithmetic=165e12),
        Card(name="mi300x", memory=192 * GiB, bandwidth=5.3e12, arithmetic=1307e12),
    )
}


def choose_card(
    gpu: str | None, memory: str | None, bandwidth: str | None, arithmetic: str | None = None
) -> Card:
    """A card by name, whose figures the others replace, or of those alone. Raises ValueError."""
    if gpu is None and (memory is None or bandwidth is None):
        raise ValueError(
            "kvplug plan needs a card: write --gpu h100, or --memory 80GiB --bandwidth 3.35TB/s "
            f"(known: {', '.join(CARDS)})"
        )
    if gpu is not None and gpu.lower() not in CARDS:
        raise ValueError(
            f"unknown card {gpu!r}.{did_you_mean(gpu.lower(), list(CARDS))} Or write --memory "
            "80GiB --bandwidth 3.35TB/s"
        )
    card = CARDS[gpu.lower()] if gpu else Card(name="this card", memory=0, bandwidth=0)
    if memory is not None:
        card = replace(card, memory=amount(memory, "memory", "80GiB"))
    if bandwidth is not None:
        card = replace(card, bandwidth=amount(bandwidth, "bandwidth", "3.35TB/s"))
    if arithmetic is not None:
        card = replace(card, arithmetic=amount(arithmetic, "arithmetic", "989T"))
    return card


def amount(text: str, name: str, example: str) -> float:
    """80GiB, 3.35TB/s, 989T -> a number. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*?)(/s|FLOPS)?\s*", text)
    unit = found.group(2).lower() if found else "?"
    if found is None or unit not in UNITS or float(found.group(1)) <= 0:
        raise ValueError(f"--{name} is a size such as {example}, got {text!r}; write {example}")
    return float(found.group(1)) * UNITS[unit]
