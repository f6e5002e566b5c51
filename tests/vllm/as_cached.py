"""What a cache keeps of a model's keys and values, by the definition of its dtype."""

from __future__ import annotations

from typing import Any

import twin
from cpu_eight_bits import NUMBERS, cut
from cuda_path import e4m3
from torch import Tensor

FLASH = twin.MODE not in ("", "v2")


def numbers(impl: Any, rows: Tensor, scale: float) -> Tensor:
    """The fp32 that lie in an impl's cache once rows are written to it, or were copied within."""
    if impl.kv_cache_dtype == "auto" or rows.dtype in NUMBERS.values():
        return rows.float()
    if FLASH:
        return e4m3(rows / scale).float()
    return cut(rows.float() * (1 / scale), NUMBERS[impl.kv_cache_dtype]).float()


def keys_and_values(impl: Any, layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both, by the layer's scales."""
    pairs = ((key, layer._k_scale_float), (value, layer._v_scale_float))
    keys, values = (numbers(impl, rows, scale) for rows, scale in pairs)
    return keys, values


def factors(impl: Any, layer: Any) -> tuple[float, float]:
    """What q . k of the numbers is to be multiplied by, and a sum of the values'.

    FlashAttention is given queries of eight bits too.
    """
    if impl.kv_cache_dtype == "auto":
        return impl.scale, 1.0
    asked = float(layer._q_scale) if FLASH else 1.0
    return impl.scale * asked * float(layer._k_scale), float(layer._v_scale)
