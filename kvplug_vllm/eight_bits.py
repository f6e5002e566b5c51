"""vLLM's own caches of eight bits: which numbers their bytes are, and what those stand for.

A cache of fp8 is bytes to vLLM, and a layer has one scale for its keys, one for its values and,
where queries are of eight bits too, one for those: a key is its number times the key scale. How
its kernels round is their own (the CPU's cuts off), so whatever is to say something of a key reads
the number that lies in the cache: who wrote it, and when, makes no difference then.
"""

from __future__ import annotations

from typing import Any

import torch

NUMBERS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Of each ``--kv-cache-dtype`` of eight bits whose pages hold keys and values and nothing else."""

PLAIN = ("auto", "float16", "bfloat16", "float32")
"""Those whose pages hold what a model may compute in."""


def numbers(cache_dtype: str) -> torch.dtype | None:
    """What lies in the cache's bytes; None where it holds what a model computes in."""
    return NUMBERS.get(cache_dtype)


def logit_factor(layer: Any) -> float:
    """What q . k of the numbers is to be multiplied by beside the model's own scale."""
    quantised = getattr(layer, "query_quant", None) is not None
    return layer._k_scale_float * (layer._q_scale_float if quantised else 1.0)


def value_factor(layer: Any) -> float:
    """What a sum of the values' numbers is to be multiplied by."""
    return layer._v_scale_float
