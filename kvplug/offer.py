"""What a server lets its requests choose, and what one request chose.

A server's start-up settings fix how its cache is laid out: which digest a page carries, how many
private pages a request may have. ``allow`` names the policies beside its own that requests may
ask for, ``max_budget`` the most tokens that one may keep. Everything else is refused when the
request arrives, before anyone else can notice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from secrets import token_hex
from typing import TypeVar

from kvplug.composition import Composition
from kvplug.compress import (
    HeadBudgets,
    LayerBudgets,
    LocalLayers,
    PositionalEviction,
    ScoredEviction,
)
from kvplug.config import FARTHEST, Settings, Span, check_keys, read_settings, token_count
from kvplug.formats import KeyCodes, PageFormat
from kvplug.generate import BlockSelector, SparsePrefill
from kvplug.grammar import parse
from kvplug.load import Selector
from kvplug.placement import Placement
from kvplug.plan import Planner
from kvplug.policy import Digest, Evidence, Policy, Sharing
from kvplug.registry import did_you_mean, policy_class
from kvplug.reuse import ChunkReuse

SERVER_KEYS = ("policy", "min_context", "protect", "allow", "max_budget")
REQUEST_KEYS = ("policy", "budget", "min_context", "protect", "compile", "chunks")
DENSE = "dense"
Kind = TypeVar("Kind", bound=Policy)
LONGEST = 10_000
"""Characters of what a request says: it is remembered, and every span costs each layer."""
MOST_SPANS = 256
MOST_CHUNKS = 256


class Refused(ValueError):
    """A request asked for what is not on offer. ``reason`` is one of a few words, to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A server's own settings, and the others that its requests may choose.

    Raises ValueError for policies that cannot share a server.
    """

    settings: Settings
    allow: tuple[str, ...] = ()
    """Names of policies that a request may ask for, alone or wrapped by one; the server's own,
    what those wrap, and dense join them."""
    max_budget: int | None = None
    """The most tokens that a KV head may keep of a prompt's whole pages."""

    def __post_init__(self) -> None:
        classes = [policy_class(name) for name in self.allow]
        own = self.settings.policy.over(_codes(classes))
        object.__setattr__(self, "settings", replace(self.settings, policy=own))
        if own.local is not None:
            self._check_local(own.local)
        if own.scored is not None and own.scored.appends and self.settings.min_context:
            raise ValueError(
                f"kvplug: {own.scored} packs each chunk of a context alike, so that others may "
                f"find it packed, and min_context is {self.settings.min_context:,}; write "
                '{"min_context": 0}, or a budget in tokens'
            )
        if own.format is not None:
            self._check_format(own.format)
        for name, cls in zip(self.allow, classes, strict=True):
            if issubclass(cls, PageFormat):
                raise ValueError(
                    f"kvplug: {name} is the format of a server's pages, which all requests share; "
                    f'drop it from "allow", and write {{"policy": "{cls()} + …"}}'
                )
            if issubclass(cls, Placement):
                raise ValueError(
                    f"kvplug: {name} serves alone: host memory is given to all of a server's "
                    'prompts; drop it from "allow", or write it as "policy"'
                )
            if issubclass(cls, ChunkReuse):
                raise ValueError(
                    f"kvplug: {name} serves alone, for requests of the server's own policy; drop "
                    'it from "allow", or write it as "policy"'
                )
            if cls.evidence is Evidence.REPETITION:
                raise ValueError(
                    f"kvplug: {name} serves alone: it packs contexts for requests of the server's "
                    'own policy; drop it from "allow", or write it as "policy"'
                )
        _ = self.digest
        if not self.mixed:
            if self.max_budget is not None:
                raise ValueError(
                    "kvplug: max_budget bounds what requests may ask for, and none may without "
                    '"allow"; add {"allow": ["snapkv"]} or drop max_budget'
                )
            return
        if own.placement is not None:
            raise ValueError(
                f"kvplug: {own.placement} cannot share a server with other policies, beside which "
                'it was never run; drop "allow"'
            )
        if own.reuse is not None:
            raise ValueError(
                f"kvplug: {own.reuse} cannot share a server with other policies, beside which it "
                'was never run; drop "allow"'
            )
        if own.scored is not None and own.scored.appends:
            raise ValueError(
                f"kvplug: {own.scored} cannot share a server with other policies: it packs "
                "prompts where they lie in the prefix cache, and leaves nothing there that others "
                'would compute; drop "allow", or write a budget in tokens'
            )
        for name, cls in zip(self.allow, classes, strict=True):
            if issubclass(cls, PositionalEviction) or own.eviction is not None:
                part = own.eviction.name if own.eviction else name
                raise ValueError(
                    f"kvplug: {part} cannot share a server with other policies: it evicts while a "
                    "prompt is prefilled, so what it leaves in the prefix cache is not what "
                    'others would compute; drop "allow", or serve it alone'
                )
            if issubclass(cls, LocalLayers) or own.local is not None:
                part = own.local.name if own.local else name
                raise ValueError(
                    f"kvplug: {part} cannot share a server with other policies: it changes the "
                    "model's layers, for requests that choose otherwise or dense too; drop "
                    '"allow", or serve it alone'
                )
            if issubclass(cls, HeadBudgets) or isinstance(own.scored, HeadBudgets):
                part = name if issubclass(cls, HeadBudgets) else str(own)
                raise ValueError(
                    f"kvplug: {part} cannot share a server with other policies: its private pages "
                    "are laid out head by head, which all that a step reads must be; drop "
                    '"allow", or serve it alone'
                )
            if issubclass(cls, LayerBudgets) or not own.uniform:
                part = str(own) if not own.uniform else name
                raise ValueError(
                    f"kvplug: {part} cannot share a server with other policies: its layers free "
                    'their pages in groups of their own; drop "allow", or serve it alone'
                )
        scored = [cls for cls in classes if issubclass(cls, ScoredEviction)]
        if scored and self.max_budget is None and own.scored is None:
            raise ValueError(
                f"kvplug: {scored[0].name} may be asked for, so max_budget must say how many "
                'tokens a request may keep; write {"max_budget": 1024}'
            )
        if own.scored is not None and self.max_tokens < own.scored.budget:
            raise ValueError(
                f"kvplug: max_budget is {self.max_budget}, less than the server's own policy "
                f"{own} keeps; raise it to {own.scored.budget}"
            )

    def _check_local(self, local: LocalLayers) -> None:
        """Whether it leaves requests what the other settings promise."""
        if self.settings.protect:
            raise ValueError(
                f"kvplug: {local.name} lets layers see a window and no protected span before it; "
                "drop protect, or use streaming_llm, which keeps those"
            )
        if self.settings.min_context > local.window:
            raise ValueError(
                f"kvplug: {local.name} changes layers for requests of every length, and those "
                f"between its window of {local.window:,} tokens and min_context, "
                f"{self.settings.min_context:,}, would not be served dense; write "
                f'{{"min_context": {local.window}}} or less, or a wider window'
            )

    def _check_format(self, format: PageFormat) -> None:
        if self.settings.min_context:
            raise ValueError(
                f"kvplug: {format} is the format of all pages, and requests of up to min_context, "
                f"{self.settings.min_context:,}, tokens would not be served dense; write "
                '{"min_context": 0}'
            )

    @property
    def format(self) -> PageFormat | None:
        """Of the server's pages; None for plain ones."""
        return self.settings.policy.format

    @property
    def mixed(self) -> bool:
        """Whether two requests of one batch may have different policies."""
        return bool(self.allow)

    @property
    def max_tokens(self) -> int:
        """The most tokens that any request keeps of a prompt's whole pages."""
        if self.max_budget is not None:
            return self.max_budget
        scored = self.settings.policy.scored
        return 0 if scored is None or scored.appends else int(scored.budget)

    @property
    def scorers(self) -> list[ScoredEviction]:
        """What may compress a prompt here: the server's own, and those that requests may name."""
        return self._offered(ScoredEviction, self.settings.policy.scored)  # type: ignore[type-abstract]

    @property
    def selectors(self) -> list[Selector]:
        """What may choose what a step reads here, as ``scorers``."""
        return self._offered(Selector, self.settings.policy.selector)  # type: ignore[type-abstract]

    @property
    def block_selectors(self) -> list[BlockSelector]:
        """What may choose what a prompt's blocks read here, as ``scorers``."""
        own = self.settings.policy.generate
        mine = own if isinstance(own, BlockSelector) else None
        return self._offered(BlockSelector, mine)  # type: ignore[type-abstract]

    @property
    def _choosers(self) -> list[Selector | BlockSelector]:
        return [*self.selectors, *self.block_selectors]

    def _offered(self, kind: type[Kind], own: Kind | None) -> list[Kind]:
        classes = [policy_class(name) for name in self.allow]
        allowed = [cls() for cls in classes if issubclass(cls, kind)]
        allowed = [self.settings.policy.reading(each) for each in allowed]
        others = [each for each in allowed if type(each) is not type(own)]
        return others if own is None else [own, *others]

    @property
    def generates(self) -> bool:
        """Whether a request may have its prompt read sparsely here."""
        classes = [policy_class(name) for name in self.allow]
        own = self.settings.policy.generate is not None
        return own or any(issubclass(cls, SparsePrefill) for cls in classes)

    def salt(self, asked: Settings, own: str | None) -> str | None:
        """What must enter the hashes of a request's pages, so that it shares them with those alone
        that would compute the same: a prompt read sparsely leaves other keys.

        own: the salt that the user gave; it separates as before, and cannot be another's. What is
        nobody else's gets one by lot.
        """
        generate = asked.policy.generate
        alone = generate is not None and generate.publishes is Sharing.NOBODY
        if not alone and not (self.mixed and self.generates):
            return own
        if own is None and generate is None:
            return None
        read = None if generate is None else f"{generate} from {asked.min_context}"
        return json.dumps([own, read, *([token_hex(16)] if alone else [])])

    @property
    def names(self) -> list[str]:
        """What a request may name, sorted."""
        own = (part.name for policy in self.settings.policy for part in policy.parts)
        return sorted({DENSE, *self.allow, *own})

    @property
    def digest(self) -> Digest | None:
        """What every page must carry so that each of the offered selectors can choose; nothing
        where pages are kept in codes, which say it."""
        if self.format is not None:
            return None
        digests = {each.name: each.digest for each in self._choosers}
        found = {name: digest for name, digest in digests.items() if digest is not None}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"kvplug: {' and '.join(found)} need different digests in a page; serve them apart"
            )
        return next(iter(found.values()), None)

    def digest_rows(self, block_size: int, itemsize: int) -> tuple[int, int]:
        """(K, rows): pages that a block of so many tokens is to what they carry, and vectors that
        each carries for a KV head, of elements of so many bytes. K is 0 without a digest."""
        for reader in self._choosers if self.digest is not None else ():
            if reader.digest is not None:
                page = reader.page(block_size)
                return block_size // page, reader.digest.rows(page, itemsize)
        return 0, 0

    def __str__(self) -> str:
        if not self.mixed:
            return str(self.settings)
        kept = f" that keep at most {self.max_tokens} tokens" if self.max_tokens else ""
        return f"{self.settings}; requests may choose {', '.join(self.names)}{kept}"

    def settings_for(self, given: object = None) -> Settings:
        """What one request asked for -> its settings.

        given: None for the server's own; a policy line; a JSON object, as text or as a mapping,
        with ``policy``, ``budget`` (of the server's policy, or of the one named), ``min_context``
        and ``protect``, or with ``compile`` or ``chunks`` alone. Raises Refused for what is not on
        offer and ValueError for what cannot be read, with what may be asked for.
        """
        if given is None:
            return self.settings
        if isinstance(given, str) and len(given) > LONGEST:
            raise ValueError(
                f"kvplug: a request may say at most {LONGEST:,} characters, got {len(given):,}; "
                "write a policy line, and protect few spans"
            )
        try:
            return _settings_for(self, given) if isinstance(given, str) else self._chosen(given)
        except (MemoryError, RecursionError):  # MemoryError: of the stack of Python's parser
            raise ValueError(
                "kvplug: what the request asks for is nested too deeply; write a policy line "
                "such as 'snapkv(budget=512)'"
            ) from None

    def _chosen(self, given: object) -> Settings:
        wanted = _read(given)
        base = self.settings
        if "compile" in wanted:
            return self._compiling(wanted)
        if "chunks" in wanted:
            return self._with_chunks(wanted)
        if "policy" in wanted:
            policy = parse(wanted["policy"])  # type: ignore[arg-type]
            if self.mixed:
                policy = policy.in_format(self.format).over(self.settings.policy.codes)
            base = replace(base, policy=policy, min_context=0)
        if "budget" in wanted:
            base = replace(base, policy=_with_budget(base.policy, wanted["budget"]))
        rest = {key: wanted[key] for key in ("min_context", "protect") if key in wanted}
        if rest:
            read = read_settings({"policy": DENSE, **rest}, environ={})
            base = replace(base, **{key: getattr(read, key) for key in rest})
        if len(base.protect) > MOST_SPANS and "protect" in rest:
            raise ValueError(
                f"kvplug: a request may protect at most {MOST_SPANS} spans, got "
                f"{len(base.protect):,}; join those that lie close"
            )
        self._check(base)
        return base

    def _compiling(self, wanted: Mapping[str, object]) -> Settings:
        if wanted != {"compile": True}:
            raise ValueError(
                f"kvplug: a request that compiles a chunk of a context says so and nothing else, "
                f'got {dict(wanted)!r}; write {{"compile": true}}'
            )
        scored = self.settings.policy.scored
        if scored is None or not scored.compiles:
            raise Refused(
                "nothing to compile",
                f"kvplug: this server compiles no contexts: it serves {self.settings}; start it "
                'with {"policy": "kvzip(budget=0.25, chunk=512)"}',
            )
        return replace(self.settings, repeats=True)

    def _with_chunks(self, wanted: Mapping[str, object]) -> Settings:
        spans = wanted["chunks"]
        if len(wanted) > 1 or not _ascend(spans):
            raise ValueError(
                "kvplug: a request names the chunks of its prompt and nothing else, as ascending "
                f"spans of tokens [first, last), at most {MOST_CHUNKS}, got "
                f'{dict(wanted)!r}; write {{"chunks": [[0, 512], [512, 900]]}}'
            )
        if self.settings.policy.reuse is None:
            raise Refused(
                "nothing to reuse",
                f"kvplug: this server takes chunks from no other place than a prompt's start: it "
                f'serves {self.settings}; start it with {{"policy": "blend(links=8)"}}',
            )
        chunks = tuple((first, last) for first, last in spans)  # type: ignore[attr-defined]
        return replace(self.settings, chunks=chunks)

    def check_prompt(
        self,
        asked: Settings,
        page_size: int,
        prompt: Sequence[object] | None,
        answer: int | None,
    ) -> None:
        """Whether a request's prompt is what its settings say, where they say it. prompt: None of
        one that is more than its tokens. answer: the most tokens that it may decode. Raises
        Refused: others will find what it leaves."""
        if asked.chunks:
            _check_chunks(asked.chunks, prompt)
        if not asked.repeats:
            return
        if prompt is None:
            raise Refused(
                "not a repetition",
                "kvplug: a context with images or audio cannot be compiled, whose tokens do not "
                "tell whether they come again; compile text",
            )
        chunk = Planner(asked, page_size).chunk * page_size
        whole = len(prompt) >= 2 * chunk and len(prompt) % chunk == 0
        if not whole or list(prompt[-chunk:]) != list(prompt[-2 * chunk : -chunk]) or answer != 1:
            raise Refused(
                "not a repetition",
                f"kvplug: a request that compiles brings a context up to a multiple of "
                f"{chunk:,} tokens, then its last {chunk:,} tokens again, and asks for one token; "
                f"got {len(prompt):,} tokens that do not end so, or max_tokens={answer}; let "
                "kvplug compile send them",
            )

    def _check(self, asked: Settings) -> None:
        own = self.settings
        dense = asked.policy == Composition().in_format(self.format).over(own.policy.codes)
        if asked == own or (dense and self.mixed and not (self.format and asked.min_context)):
            return
        if not self.mixed:
            raise Refused(
                "nothing to choose",
                f"kvplug: this server lets no request choose: it serves {own}, got {asked}; start "
                f'it with {{"allow": {json.dumps([p.name for p in asked.policy] or [DENSE])}}}',
            )
        if self.format is not None and (asked.min_context or asked.policy.format != self.format):
            raise Refused(
                "other pages",
                f"kvplug: all pages of this server are kept as {self.format}, for requests of any "
                f"length, got {asked}; leave {self.format.name} and min_context out",
            )
        for policy in (part for each in asked.policy for part in each.parts):
            if policy.name not in self.names:
                raise Refused(
                    "not allowed",
                    f"kvplug: this server does not allow {policy.name}."
                    f"{did_you_mean(policy.name, self.names)}",
                )
        for file in asked.policy.files:
            if file not in own.policy.files:
                raise Refused(
                    "not allowed",
                    f"kvplug: files are the server's, and {file!r} is not one of its own policy, "
                    f"{own.policy}; ask without it",
                )
        for reader in (asked.policy.selector, asked.policy.generate):
            digest = getattr(reader, "digest", None)
            if self.format is None and digest not in (None, self.digest):
                raise Refused(
                    "other digests",
                    f"kvplug: this server's pages do not carry what {reader} reads, but "
                    f"{self.digest}; ask for a policy that reads it, or leave its options out",
                )
        scored = asked.policy.scored
        if scored is not None and scored.appends:
            raise Refused(
                "other pages",
                f"kvplug: {scored} packs prompts where they lie, for a server of its own; ask for "
                "a budget in tokens",
            )
        if scored is not None and scored.budget > self.max_tokens:
            raise Refused(
                "over max_budget",
                f"kvplug: a request may keep at most {self.max_tokens} tokens here (the server's "
                f"max_budget), got {asked.policy}; ask for less",
            )


def read_offer(given: object = None, environ: Mapping[str, str] | None = None) -> Offer:
    """The ``kvplug`` entry of an engine's configuration -> what the server offers.

    As ``read_settings``, and ``allow`` (names of policies) and ``max_budget`` (tokens). Raises
    ValueError that names the key, what was wanted, what came and what to write instead.
    """
    own = {f.name for f in fields(Offer)} - {"settings"}
    rest, offer = given, {}
    if isinstance(given, Mapping):
        check_keys(given, SERVER_KEYS)
        rest = {key: value for key, value in given.items() if key not in own}
        offer = {key: value for key, value in given.items() if key in own}
    allow, budget = offer.get("allow", ()), offer.get("max_budget")
    if isinstance(allow, str) or not all(
        isinstance(name, str) for name in (allow if isinstance(allow, (list, tuple)) else [0])
    ):
        raise ValueError(
            f"kvplug: allow must be a list of policy names, got {allow!r}; "
            'write {"allow": ["snapkv", "quest"]}'
        )
    return Offer(
        settings=read_settings(rest, environ),
        allow=tuple(sorted(set(allow))),
        max_budget=None if budget is None else token_count(budget, "max_budget"),
    )


def _ascend(spans: object) -> bool:
    """Whether they are spans of tokens, one behind the other."""
    if not isinstance(spans, (list, tuple)) or not 0 < len(spans) <= MOST_CHUNKS:
        return False
    end = 0
    for span in spans:
        if not isinstance(span, (list, tuple)) or len(span) != 2:
            return False
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in span):
            return False
        if not end <= span[0] < span[1] < FARTHEST:
            return False
        end = span[1]
    return True


def _check_chunks(chunks: tuple[Span, ...], prompt: Sequence[object] | None) -> None:
    if prompt is None:
        raise Refused(
            "other chunks",
            "kvplug: chunks of a prompt with images or audio cannot be taken from elsewhere: its "
            "tokens do not tell what they show; leave chunks out",
        )
    if chunks[-1][1] > len(prompt):
        raise Refused(
            "other chunks",
            f"kvplug: the prompt has {len(prompt):,} tokens, and a chunk of it is named that ends "
            f"behind {chunks[-1][1]:,}; count the tokens of the whole prompt, as the server's "
            "/tokenize does",
        )


def _codes(allowed: Sequence[type[Policy]]) -> KeyCodes | None:
    """What pages must say of their keys in few bits for these."""
    choosers = (cls() for cls in allowed if issubclass(cls, (Selector, BlockSelector)))
    digests = (each.digest for each in choosers)
    return next((digest for digest in digests if isinstance(digest, KeyCodes)), None)


@lru_cache(maxsize=4096)
def _settings_for(offer: Offer, given: str) -> Settings:
    return offer._chosen(given)


def _read(given: object) -> Mapping[str, object]:
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"kvplug: cannot read the JSON object {given!r}: {error}") from None
    elif isinstance(given, str):
        given = {"policy": given}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"kvplug: a request names a policy such as 'snapkv(budget=512)' or a JSON object "
            f"with {', '.join(REQUEST_KEYS)}, got {given!r}"
        )
    for key in given:
        if key not in REQUEST_KEYS:
            raise ValueError(
                f"kvplug: a request has no setting {key!r}."
                f"{did_you_mean(str(key), list(REQUEST_KEYS))}"
            )
    return given


def _with_budget(policy: Composition, budget: object) -> Composition:
    bounded = [part for part in policy if "budget" in {f.name for f in fields(part) if f.init}]
    if len(bounded) != 1:
        raise ValueError(
            f"kvplug: budget={budget!r} fits one policy that has a budget, and {str(policy)!r} "
            f"names {len(bounded)}; write the whole line as policy"
        )
    changed = replace(bounded[0], budget=budget)  # type: ignore[call-arg]
    changed_line = tuple(changed if part is bounded[0] else part for part in policy)
    return replace(policy, policies=changed_line)
