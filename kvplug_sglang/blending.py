"""Chunks of a prompt that are taken from wherever SGLang's radix tree has them.

What a chunk is as a prompt of its own any request leaves there: one of the chunk alone, or one
that begins with it. A row's slots may lie in any order, but what a step computes of a prompt is
one range behind its cached prefix, from admission to the model's input. So a request that names
chunks is reordered as in ``Arrangement``, and what it takes is put into the tree as that prefix
before SGLang looks for it: pages of their own, under a name that tells them from all others',
which the backend fills before the step that reads them. All else (who holds them, what is charged
for them, when they leave, what comes with them next time) is what SGLang does about prefixes.

If a page is in no place, or there is no room, or the plain prefix has as much, the prompt lies as
it is read. That is asked each time SGLang looks for the prefix of a request that holds nothing: in
every pass in which it waits at the front, and after a retraction.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kvplug import Arrangement, Refused, Settings, arrange, rearranged
from kvplug_sglang import compat
from kvplug_sglang.compat import Hook, Match
from kvplug_sglang.settings import Engine, Taken


@dataclass(kw_only=True)
class Asked:
    """A request that names chunks of which some may be taken."""

    settings: Settings
    prompt: array[int]
    """As it is read."""
    salt: str | None
    """The user's."""
    arrangement: Arrangement

    @cached_property
    def chunks(self) -> dict[int, array[int]]:
        """The tokens of those that are taken from, up to the last that is."""
        size = self.arrangement.page_size
        return {
            each.chunk: self.prompt[each.start : each.start + each.pages.stop * size]
            for each in self.arrangement.placed
        }

    @cached_property
    def rearranged(self) -> array[int]:
        return array("q", rearranged(self.prompt, self.arrangement))

    @cached_property
    def own(self) -> str:
        """The salt of a request with these chunks. What is taken of them depends on the tokens
        before it too, which come behind it in the order."""
        contents = ["" for _ in self.settings.chunks]
        for number, tokens in self.chunks.items():
            contents[number] = hashlib.sha256(tokens.tobytes()).hexdigest()
        line = str(self.settings.policy)
        return self.arrangement.own(line, self.salt, contents).hex()


def ask(self: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Before ``Scheduler._add_request_to_queue``: all that is known of a request is, by then."""
    settings = req.kvplug_settings
    if req.to_finish is not None or req.kvplug_asked is not None or not settings.chunks:
        return
    engine = Engine.serving()
    plain = req.kvplug_settings = replace(settings, chunks=())
    try:
        check(engine, settings, req)
    except Refused as error:
        req.set_finish_with_abort(str(error))
        engine.refused(error)
        return
    reuse, prompt = settings.policy.reuse, req.origin_input_ids
    assert reuse is not None
    arrangement = arrange(reuse, settings.chunks, len(prompt), engine.page_size)
    if len(prompt) <= plain.min_context or not arrangement.cached:
        return
    req.kvplug_asked = Asked(
        settings=settings, prompt=prompt, salt=req.cache_salt, arrangement=arrangement
    )


def check(engine: Engine, settings: Settings, req: Any) -> None:
    """Raises Refused for a prompt whose chunks are not what they are said to be, or of which more
    is wanted than an answer."""
    prompt = req.origin_input_ids
    tokens = prompt if req.multimodal_inputs is None else None
    answer = req.sampling_params.max_new_tokens
    engine.offer.check_prompt(settings, engine.page_size, tokens, answer)
    scored = req.return_logprob and 0 <= req.logprob_start_len < len(prompt)
    embedded = req.input_embeds is not None or req.positional_embed_overrides is not None
    for what, has, instead in (
        ("log-probabilities", scored, "logprob_start_len"),
        ("hidden states", req.return_hidden_states, "return_hidden_states"),
        ("embeddings in place of tokens", embedded, "input_embeds"),
    ):
        if has:
            raise Refused(
                f"prompt {what}",
                f"kvplug: a prompt whose chunks are taken from elsewhere has no {what}, as most "
                f"of it is not computed; leave chunks out, or {instead}",
            )


def look_up(self: Any, tree_cache: Any = None, *args: Any, **kwargs: Any) -> None:
    """Before ``Req.init_next_round_input`` looks for a prefix, of a request that holds nothing."""
    asked = self.kvplug_asked
    if asked is None or tree_cache is None or self.kv.holds_kv or self.to_finish is not None:
        return
    moved = take(tree_cache, self, asked)
    if moved:
        compat.reorder(self, asked.rearranged, asked.own)
    else:
        compat.reorder(self, asked.prompt, asked.salt)
    settings = asked.settings
    self.kvplug_settings = settings if moved else replace(settings, chunks=())


def take(tree: Any, req: Any, asked: Asked) -> bool:
    """Whether the tree has, as the prefix of a request that lies as arranged, all that it takes:
    from before, or from now on."""
    engine, key, arrangement = Engine.serving(), req.extra_key, asked.arrangement
    size, wanted = arrangement.page_size, arrangement.cached * arrangement.page_size
    plain = compat.match(tree, asked.prompt + req.output_ids, key, asked.salt)
    own = compat.match(tree, asked.rearranged + req.output_ids, key, asked.own)
    if max(own.tokens, wanted) <= plain.tokens:
        return False
    if own.tokens >= wanted:
        return True
    chunks: dict[int, Match] = {}
    for number, tokens in asked.chunks.items():
        chunks[number] = compat.match(tree, tokens, key, asked.salt)
        if chunks[number].tokens < len(tokens):
            return False
    slots = compat.allocate(tree, wanted - own.tokens, [own, *chunks.values()])
    if slots is None:
        return False
    sources = [
        compat.matched_slots(tree, chunks[each.chunk])[::size][each.pages.start :]
        for each in arrangement.placed
    ]
    known, (_, _, shifts) = own.tokens // size, arrangement.sources
    engine.taken.append(
        Taken(torch.cat(sources)[known:] // size, slots[::size] // size, shifts[known:])
    )
    slots = torch.cat([compat.matched_slots(tree, own), slots])
    compat.publish(tree, asked.rearranged[:wanted], slots, own.tokens, key, asked.own)
    return True


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue", "before", ask,
        ("self", "req"),
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.Req.init_next_round_input", "before", look_up,
        ("self", "tree_cache"),
    ),
)  # fmt: skip
