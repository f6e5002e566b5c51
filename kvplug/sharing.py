"""Layers that read another layer's cache, such as the last ones of Gemma 3n and Gemma 4.

They select by their own queries over its pages and digests. What its owner packs, it packs for all
of them: by keys, as it does not see their queries, and alike in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvplug.config import Settings
from kvplug.offer import Offer

SHARED = "some of the model's layers read another layer's cache"


def refusals(offer: Offer) -> Iterator[str]:
    """Why a server of such a model cannot have an offer, each reason with what to do instead."""
    for scored in offer.scorers:
        if scored.needs_queries:
            yield (
                f"{SHARED}, and {scored.name} scores by the queries of each layer alone; use "
                "keydiff, which scores by keys, or the policy 'dense'"
            )
    policy = offer.settings.policy
    if not policy.uniform:
        yield (
            f"{SHARED}, and {policy} gives layers different budgets; give them one budget, such "
            "as keydiff(budget=1024)"
        )


def beside(settings: Settings) -> Iterator[str]:
    """Why neither such a server nor a request of it can have some settings."""
    scored = settings.policy.scored
    if scored is not None and scored.every is not None:
        yield (
            f"{scored} packs a cache anew that other layers still read in the same step; leave "
            "interval and chunk out"
        )
