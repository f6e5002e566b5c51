"""Layers that read another layer's cache, which SGLang gives the number of its owner.

They select by their own queries over its pages and digests. What its owner packs, it packs for all
of them: by keys, as it does not see their queries, and alike in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvplug import Offer, Refused, Settings

SHARED = "some of the model's layers read another layer's cache"


def check(settings: Settings) -> None:
    """Raises Refused for a policy that packs again what the others still read."""
    scored = settings.policy.scored
    if scored is not None and scored.every is not None:
        raise Refused(
            "shared caches",
            f"{scored} packs a cache anew that other layers still read in the same step; leave "
            "interval and chunk out",
        )


def refusals(offer: Offer) -> Iterator[str]:
    """The reasons why such a model cannot be served, each saying what to do instead."""
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
    try:
        check(offer.settings)
    except Refused as error:
        yield str(error)
