"""Rotary position embeddings, as far as keys may be moved by them.

Where a key's angles are its position times a frequency of each pair of channels, a key at j turned
by d times those frequencies is the key at j + d, whatever factor the embedding multiplied it by.
Angles are computed in double precision on the host; a moved key in bfloat16 is rounded twice, so
keys are always turned from where they were computed, never from where they were moved to.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
https://arxiv.org/abs/2104.09864. Scalings as in transformers' ``modeling_rope_utils``: linear,
Llama 3's, and YaRN's (Peng et al., 2023, https://arxiv.org/abs/2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug.policy import Positions

ROTATED_LAST = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
"""Models all of whose layers rotate halves of their keys, with nothing behind that."""


@dataclass(frozen=True)
class Rotation:
    """Of the first channels of each key: channel i with channel i + n of 2 n."""

    frequencies: tuple[float, ...]
    """Radians a token. [n]"""

    @classmethod
    def of(cls, config: Any, head_size: int) -> Rotation:
        """config: a model's, of transformers, that of its text. Raises ValueError for a model
        whose keys cannot be moved, with the reason."""
        names = getattr(config, "architectures", None) or ["a model without a name"]
        if names[0] not in ROTATED_LAST:
            raise ValueError(
                f"keys of {names[0]} were never moved; known are {', '.join(ROTATED_LAST)}"
            )
        given = getattr(config, "rope_parameters", None)
        if not given:
            raise ValueError("the model has no rotary embedding by which its keys could be moved")
        return cls(_frequencies(given, config, head_size))

    def angles(self, shifts: Positions) -> tuple[Tensor, Tensor]:
        """Cosines and sines for keys that move by so many tokens. [m] -> [m, n] fp32 twice"""
        turns = torch.from_numpy(np.multiply.outer(shifts, np.array(self.frequencies)))
        return turns.cos().float(), turns.sin().float()

    def in_parts(self, shifts: Positions, most: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """So many keys at most at a time: which, and their ``angles``. shifts [m]"""
        for first in range(0, len(shifts), most):
            part = slice(first, first + most)
            yield part, *self.angles(shifts[part])


def turn(keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Keys moved as ``Rotation.angles`` says for each of m. keys [m, S, H, D], of any float dtype;
    what is not rotated stays as it is."""
    n = cosines.shape[1]
    cosines, sines = cosines[:, None, None], sines[:, None, None]
    first, second = keys[..., :n].float(), keys[..., n : 2 * n].float()
    moved = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.cat([*(each.to(keys.dtype) for each in moved), keys[..., 2 * n :]], -1)


def _frequencies(given: Mapping[str, Any], config: Any, head_size: int) -> tuple[float, ...]:
    """In single precision up to here, as engines have them."""
    kind = given.get("rope_type", "default")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError("layers of the model rotate their keys differently")
    if "mrope_section" in given:
        raise ValueError("the model rotates keys by several positions (M-RoPE)")
    dims = int(head_size * given.get("partial_rotary_factor", 1.0))
    theta = given["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if kind == "default":
        found = plain
    elif kind == "linear":
        found = plain / given["factor"]
    elif kind == "llama3":
        found = _llama3(plain, given)
    elif kind == "yarn":
        found = _yarn(plain, given, config, dims)
    else:
        raise ValueError(
            f"the model's rotary embedding is scaled by {kind!r}, under which a key's angles are "
            "not its position times a frequency"
        )
    return tuple(found.double().tolist())


def _llama3(plain: Tensor, given: Mapping[str, Any]) -> Tensor:
    factor, most = given["factor"], given["original_max_position_embeddings"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    share = ((most * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / factor + share * plain


def _yarn(plain: Tensor, given: Mapping[str, Any], config: Any, dims: int) -> Tensor:
    """Without its factor, which keys have already."""
    factor, theta = given["factor"], given["rope_theta"]
    most = given.get("original_max_position_embeddings") or config.max_position_embeddings

    def channel(turns: float) -> float:
        return dims * math.log(most / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(given.get("beta_fast") or 32), channel(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (torch.arange(dims // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    stretched = ramp.clamp(0, 1)
    return plain / factor * stretched + plain * (1 - stretched)
