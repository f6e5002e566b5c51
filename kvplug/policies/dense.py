"""Dense: keep everything, read everything; the engine's own path, untouched.

The baseline that every other policy is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.policy import Action, Evidence, Granularity, Policy, Stage


@dataclass(frozen=True, kw_only=True)
class Dense(Policy):
    name = "dense"
    stage = Stage.LOAD
    action = Action.VISIBILITY
    granularity = Granularity.PAGE
    evidence = Evidence.NONE
    query_agnostic = True
    memory = "all tokens"
    reads = "all tokens"
    paper = "https://arxiv.org/abs/1706.03762"
