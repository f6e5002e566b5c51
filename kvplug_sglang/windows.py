"""Layers that see a window of the context, beside those that a policy plans.

They stay on the stock path, over slots that they share with the planned layers: one of SGLang's
slots spans all layers. What a policy takes from a request it takes from them too, so it must leave
them their window.
"""

from __future__ import annotations

import numpy as np

from kvplug import Planner, Refused


def check(planner: Planner, window: int, longest: int) -> None:
    """Raises Refused unless a policy leaves a window of so many tokens, the query's own included,
    to every query of a request of up to ``longest`` tokens."""
    policy, size = planner.settings.policy, planner.page_size
    needed = min(window, longest) - 1
    private = planner.schedule.most_private
    if planner.schedule.every:
        raise Refused(
            "answers beside a window",
            f"kvplug: {policy} takes tokens of an answer that the model's windowed layers, whose "
            "tokens share their slots, still see; leave interval and chunk out",
        )
    if planner.scored is not None and private * size < needed:
        raise Refused(
            "narrower than a window",
            f"kvplug: {policy} keeps {private * size} tokens of a prompt, and the model's "
            f"windowed layers, whose tokens share their slots, see {needed} before each query; "
            f"write budget={needed} or more, or a policy that selects",
        )
    if planner.eviction is not None:
        positions = np.arange(longest)
        begin = planner.first_pages(positions) * size
        if (begin > np.maximum(positions - needed, 0)).any():
            raise Refused(
                "narrower than a window",
                f"kvplug: {policy} evicts tokens that the model's windowed layers, whose tokens "
                f"share their slots, still see: {needed} before each query; write "
                f"window={needed + 1} or more, or a policy that selects",
            )
