"""lm-eval model classes that serve through an engine with kvplug, turn by turn.

Importing this module registers ``kvplug-vllm`` and ``kvplug-sglang``. Documents of our tasks
(``evals/tasks``) are submitted in waves, turn k of all contexts at once; documents of other tasks
are one wave of plain prompts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from kvplug_evals.engines.interface import Engine, EngineOptions, Reply, Request
from kvplug_evals.engines.start import start_engine
from kvplug_evals.models.folder import AUTO
from kvplug_evals.scbench.documents import encoder, history
from kvplug_evals.sweep.journal import Journal

QUESTIONS = ("aware", "agnostic")
ANSWERS = ("golden", "own")
LOSS = "/loss"


class KVPlugLM(LM):
    """Options beyond the engine's:

    question  aware: the question stands in the prompt, so a policy that compresses prompts sees
              it. agnostic: the prompt ends with the context, which is all that is compressed; the
              turns so far and the question are fed behind it as forced decode tokens.
    answers   golden: later turns quote the true answers. own: the model's.
    losses    also force the true answer, for its loss and the model's agreement with it.

    The cue that begins an answer is always forced: every token of an answer is then decoded from
    what a policy left or reads, none computed by the prefill.
    """

    engine_name: ClassVar[str]

    def __init__(
        self,
        pretrained: str,
        policy: str = "dense",
        question: str = QUESTIONS[0],
        answers: str = ANSWERS[0],
        losses: bool = True,
        max_model_len: int = 8192,
        max_num_seqs: int = 8,
        block_size: int = 32,
        kv_cache_mib: int = 512,
        dtype: str = AUTO,
        threads: int = 1,
        enforce_eager: bool = True,
        multiprocess: bool = True,
        engine: Engine | None = None,
        journal: Journal | None = None,
        answered: Callable[[], object] = lambda: None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **_metadata: Any,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("question", question, QUESTIONS),
            ("answers", answers, ANSWERS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        self.question, self.answers, self.losses = question, answers, losses
        self.most = max_num_seqs
        self.journal = journal or Journal()
        self.answered = answered
        self.seen: set[str] = set()
        self.tokenizer = encoder(pretrained)
        self.engine = engine or start_engine(
            self.engine_name,
            policy,
            EngineOptions(
                model=pretrained,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                block_size=block_size,
                kv_cache_mib=kv_cache_mib,
                dtype=dtype,
                threads=threads,
                enforce_eager=enforce_eager,
                multiprocess=multiprocess,
            ),
        )

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        by_turn: dict[tuple[str, int], list[Any]] = defaultdict(list)
        for instance in requests:
            turn = instance.doc["turn"] if _is_ours(instance.doc) else 0
            by_turn[instance.task_name, turn].append(instance)
        for _, instances in sorted(by_turn.items()):
            for start in range(0, len(instances), self.most):
                together = instances[start : start + self.most]
                self._encode([i for i in together if self._wants_context(i)])
                self._wave([self._generation(i) for i in together])
                if self.losses and all(_is_ours(i.doc) for i in together):
                    self._wave([self._loss(i) for i in together])
        return [self.journal.replies[_key(instance)].text for instance in requests]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of continuations that are forced, token by token, so that the policy is exercised.

        The first token of a continuation is still the prefill's word.
        """
        wanted = []
        for number, instance in enumerate(requests):
            context, continuation = instance.args[:2]
            prompt = self._encode_text(context, special=True)
            if not prompt:
                raise ValueError(
                    "a loglikelihood request has an empty context, and there is nothing to "
                    "decode behind; give the task a context"
                )
            forced = self._encode_text(continuation)
            key = f"{instance.task_name}/{instance.doc_id}/{number}{LOSS}"
            wanted.append(Request(key=key, prompt=prompt, forced=forced, scored=len(forced)))
        for start in range(0, len(wanted), self.most):
            self._wave(wanted[start : start + self.most])
        replies = [self.journal.replies[request.key] for request in wanted]
        return [(-sum(reply.losses), all(reply.agreed)) for reply in replies]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError(
            "rolling log-likelihoods are computed by the prefill alone, which no policy of kvplug "
            "changes; use a task of output_type loglikelihood or generate_until"
        )

    def close(self) -> None:
        self.engine.close()

    def _wants_context(self, instance: Any) -> bool:
        """Whether the engine is to see the context before it is asked: in multi-request mode,
        and where an interrupted conversation goes on in a new engine."""
        doc = instance.doc
        if not _is_ours(doc) or _key(instance) in self.journal.replies:
            return False
        seen = f"{instance.task_name}/{doc['number']}"
        first = seen not in self.seen
        self.seen.add(seen)
        return first and (doc["mode"] == "multi-request" or doc["turn"] > 0)

    def _encode(self, instances: list[Any]) -> None:
        """Contexts, with what was said so far, into the prefix cache; not part of any figure."""
        prompts = [
            [t for text in self._said(i) for t in self._encode_text(text)] for i in instances
        ]
        if instances:
            self.engine.run(
                [
                    Request(
                        key=_key(i),
                        prompt=self._encode_text(i.doc["context"], special=True) + said,
                        new_tokens=1,
                    )
                    for i, said in zip(instances, prompts, strict=True)
                ]
            )

    def _wave(self, requests: list[Request]) -> None:
        missing = [r for r in requests if r.key not in self.journal.replies]
        if missing:
            wave = self.engine.run(missing, self._note)
            self.journal.add_wave(wave, self.engine.block_bytes)

    def _note(self, reply: Reply) -> None:
        self.journal.add(reply)
        self.answered()

    def _generation(self, instance: Any) -> Request:
        doc = instance.doc
        if not _is_ours(doc):
            context, options = instance.args
            until = options.get("until") or []
            return Request(
                key=_key(instance),
                prompt=self._encode_text(context, special=True),
                new_tokens=int(options.get("max_gen_toks", 128)),
                until=tuple([until] if isinstance(until, str) else until),
            )
        prompt, forced = self._split(instance)
        return Request(
            key=_key(instance),
            prompt=prompt,
            forced=forced,
            new_tokens=doc["new_tokens"],
            until=tuple(json.loads(doc["until"])),
        )

    def _loss(self, instance: Any) -> Request:
        prompt, forced = self._split(instance)
        gold = self._encode_text(instance.doc["gold"])
        # Without anything forced before it, the first token is the prefill's word.
        scored = len(gold) if forced else len(gold) - 1
        return Request(
            key=_key(instance) + LOSS, prompt=prompt, forced=forced + gold, scored=scored
        )

    def _split(self, instance: Any) -> tuple[list[int], list[int]]:
        """What the prompt holds, and what is fed behind it."""
        doc = instance.doc
        context = self._encode_text(doc["context"], special=True)
        said = [token for text in self._said(instance) for token in self._encode_text(text)]
        question, cue = self._encode_text(doc["question"]), self._encode_text(doc["cue"])
        if self.question == "agnostic":
            return context, said + question + cue
        return context + said + question, cue

    def _said(self, instance: Any) -> Iterator[str]:
        """The turns so far, in pieces that are the same in every turn."""
        for turn, part in enumerate(history(instance.doc)):
            yield part["question"]
            yield part["cue"]
            if self.answers == "golden":
                yield part["gold"]
            else:
                earlier = instance.doc_id - instance.doc["turn"] + turn
                yield self.journal.replies[f"{instance.task_name}/{earlier}"].text
            yield part["close"]

    def _encode_text(self, text: str, special: bool = False) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=special).input_ids
        return tokens


@register_model("kvplug-vllm")
class KVPlugVLLM(KVPlugLM):
    engine_name = "vllm"


@register_model("kvplug-sglang")
class KVPlugSGLang(KVPlugLM):
    engine_name = "sglang"


MODELS = {cls.engine_name: cls for cls in (KVPlugVLLM, KVPlugSGLang)}


def _is_ours(doc: dict[str, Any]) -> bool:
    """Other tasks have documents with a context, a turn or a gold of their own."""
    return "conversation" in doc and "cue" in doc


def _key(instance: Any) -> str:
    return f"{instance.task_name}/{instance.doc_id}"
