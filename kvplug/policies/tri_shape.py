"""Tri-shape: A-shape, and the prompt's last queries read everything.

    query t reads token j  iff  j < sinks  or  t - window < j <= t  or  t >= prompt - last

Li et al., "SCBench: A KV Cache-Centric Analysis of Long-Context Methods", ICLR 2025,
https://arxiv.org/abs/2412.10319

Differs from the paper: as A-shape does; and the other queries are not denied the last tokens'
keys, which none of them sees anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.policies.a_shape import AShape


@dataclass(frozen=True, kw_only=True)
class TriShape(AShape):
    name = "tri_shape"
    reads = "all; a prompt's queries sinks + window, its last ones all"
    paper = "https://arxiv.org/abs/2412.10319"

    last: int = 64
