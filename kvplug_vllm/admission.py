"""What a request may ask for, judged by the engine that it goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from kvplug import Planner, Refused, Settings
from kvplug_vllm import compat
from kvplug_vllm.metrics import count_refused
from kvplug_vllm.refusals import beside
from kvplug_vllm.settings import REQUEST_FIELD, asked_for, offer_of, selected


class Judging:
    """Whether this process judges: from the first engine that is set to kvplug on."""

    begun: ClassVar[bool] = False


def judge_requests() -> None:
    """From now on, for each engine that this process admits to, and for the core that it is."""
    compat.announce_requests(judge, salted, judge_prompt)
    Judging.begun = True


def judge_sessions_and_beams() -> None:
    """From now on, where requests are admitted: those that are more than one request."""
    compat.announce_sessions(refuse_session)
    compat.announce_beams(refuse_beams)


def judge(vllm_config: Any, sampling_params: Any) -> None:
    """Raises ValueError for what is not on offer."""
    asked = asked_for(sampling_params)
    if asked is None:
        return
    settings = settings_for(vllm_config, asked)
    if settings.chunks and sampling_params.prompt_logprobs is not None:
        count_refused("prompt log-probabilities")
        raise Refused(
            "prompt log-probabilities",
            "kvplug: a prompt whose chunks are taken from elsewhere has no log-probabilities, as "
            "most of it is not computed; leave chunks out, or prompt_logprobs",
        )


def judge_prompt(vllm_config: Any, request: Any) -> None:
    """Raises ValueError for a prompt that is not what the request says it is. request: an
    EngineCoreRequest"""
    params = request.sampling_params
    asked = asked_for(params)
    if not selected(vllm_config):
        return
    if offer_of(vllm_config).settings.policy.placement is not None:
        check_room(vllm_config, request)
    if asked is None:
        return
    offer, size = offer_of(vllm_config), vllm_config.cache_config.block_size
    seen = None if request.mm_features else request.prompt_token_ids or ()
    try:
        offer.check_prompt(offer.settings_for(asked), size, seen, params.max_tokens)
    except Refused as error:
        count_refused(error.reason)
        raise


def check_room(vllm_config: Any, request: Any) -> None:
    """Raises Refused for a prompt that all of host memory does not hold: it would wait forever."""
    planner = Planner(offer_of(vllm_config).settings, vllm_config.cache_config.block_size)
    schedule, tokens = planner.schedule, len(request.prompt_token_ids or ())
    placement, private = schedule.placement, schedule.course(tokens).private
    assert placement is not None
    if private - placement.pages > schedule.directory:
        count_refused("host memory")
        room = schedule.directory * schedule.digests * planner.page_size
        raise Refused(
            "host memory",
            f"kvplug: the prompt has {tokens:,} tokens, and host memory holds {room:,} of all "
            f"requests; send a shorter one, or start the server with {placement.name}(pages="
            f"{placement.pages}, room={tokens})",
        )


def salted(vllm_config: Any, sampling_params: Any, salt: str | None) -> str | None:
    """The salt of an admitted request's pages; ``salt``: the user's."""
    if not selected(vllm_config):
        return salt
    offer = offer_of(vllm_config)
    return offer.salt(offer.settings_for(asked_for(sampling_params)), salt)


def settings_for(vllm_config: Any, asked: object) -> Settings:
    """What a request's words mean to this engine. Raises ValueError."""
    if not selected(vllm_config):
        raise ValueError(not_selected(asked))
    try:
        settings = offer_of(vllm_config).settings_for(asked)
        for label, reason in beside(settings, vllm_config):
            raise Refused(label, f"kvplug: {reason}")
        return settings
    except ValueError as error:
        count_refused(error.reason if isinstance(error, Refused) else "unreadable")
        raise


def not_selected(asked: object) -> str:
    return (
        f"the request asks for the KV policy {asked!r} ({REQUEST_FIELD}), and this server "
        "was started without it; start it with --attention-backend kvplug"
    )


def refuse_session(vllm_config: Any) -> None:
    """Its prompt grows by its own answers, and a compressed one has no blocks before them.
    Raises Refused.
    """
    if not selected(vllm_config):
        return
    offer = offer_of(vllm_config)
    if offer.settings.policy.reuse is not None:
        count_refused("session")
        raise Refused(
            "session",
            "kvplug: a session whose turns stream in has no chunks that could be named; send each "
            "turn as a request with the whole prompt, which the prefix cache serves",
        )
    if offer.mixed or offer.settings.policy.packs:
        count_refused("session")
        raise Refused(
            "session",
            "kvplug: a session whose turns stream in cannot be served where prompts are "
            "compressed; send each turn as a request with the whole prompt, which the prefix "
            "cache serves",
        )


def refuse_beams(vllm_config: Any, params: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Each step of a beam is a prompt of its own with one token to answer: nothing is decoded
    that could be selected for, or from what a compression left. Raises ValueError.
    """
    asked = asked_for(params)
    if asked is None and not selected(vllm_config):
        return
    settings = settings_for(vllm_config, asked)
    policy = settings.policy
    if policy.selector is None and policy.scored is None:
        return
    planner = Planner(settings, vllm_config.cache_config.block_size)
    prompt = np.array([len(tokens) for tokens in prompts])
    last = prompt + params.max_tokens
    if not policy.uniform or not planner.plan(last - 1, last, prompt).untouched:
        count_refused("beam search")
        raise Refused(
            "beam search",
            f"kvplug: beam search asks for each token as a prompt of its own, which {policy} has "
            "no part in; ask for n answers without use_beam_search, or serve it under 'dense'",
        )
