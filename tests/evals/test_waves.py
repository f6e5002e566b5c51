"""What is submitted when, and what stands in a prompt: the model class without an engine.

In the engine's place stands a list of what it was asked; what engines do is tested in them.
"""

from itertools import chain

import pytest

pytest.importorskip("lm_eval")

from kvplug_evals.engines.interface import Reply, Wave
from kvplug_evals.lm import KVPlugVLLM
from kvplug_evals.models.folder import write_word_tokenizer
from kvplug_evals.models.recall import VOCAB, word
from kvplug_evals.sweep.journal import Journal
from kvplug_evals.sweep.settings import folder

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval
OWN = [7, 8, 9]


class Asked:
    """Answers k7 k8 k9 to everything and keeps the waves."""

    block_bytes, blocks, environment = 1, 1, {}

    def __init__(self):
        self.waves = []

    def run(self, requests, finished=lambda reply: None):
        self.waves.append(list(requests))
        replies = [
            Reply(
                key=request.key,
                text=" ".join(map(word, OWN)),
                tokens=OWN,
                prompt_tokens=len(request.prompt),
                cached_tokens=0,
                first_token_seconds=0.0,
                token_seconds=0.0,
                losses=[0.5] * request.scored,
                agreed=[True] * request.scored,
            )
            for request in requests
        ]
        for reply in replies:
            finished(reply)
        return Wave(
            replies=replies,
            seconds=0.0,
            peak_blocks=1,
            held_blocks=1,
            queries=0,
            cached=0,
            read=0,
        )

    def forget(self): ...

    def close(self): ...


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_word_tokenizer(folder, [word(token) for token in range(VOCAB)])
    return str(folder)


def ask(tokenizer, mode="multi-turn", journal=None, **options):
    """-> the waves, and lm-eval's samples"""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    engine = Asked()
    lm = KVPlugVLLM(
        tokenizer,
        engine=engine,
        journal=journal,
        **{"max_num_seqs": 2, "losses": False, **options},
    )
    manager = TaskManager(
        include_path=str(folder("tasks")),
        include_defaults=False,
        metadata={
            "pretrained": tokenizer,
            "tokens": 64,
            "pairs": 16,
            "hops": 3,
            "contexts": 2,
            "turns": 3,
            "mode": mode,
        },
    )
    found = simple_evaluate(lm, tasks=["kvplug_recall"], task_manager=manager, bootstrap_iters=0)
    return engine.waves, found["samples"]["kvplug_recall"]


def numbers(sample, name):
    return [int(w[1:]) for w in sample["doc"][name].split()]


def test_a_wave_is_a_turn_of_all_contexts(tokenizer):
    waves, samples = ask(tokenizer)
    assert [[r.key for r in wave] for wave in waves] == [
        [f"kvplug_recall/{doc}" for doc in docs] for docs in ((0, 3), (1, 4), (2, 5))
    ]
    assert [s["doc"]["turn"] for s in samples] == [0, 1, 2] * 2


def test_a_prompt_holds_the_question_and_the_cue_is_decoded(tokenizer):
    waves, samples = ask(tokenizer)
    question = numbers(samples[1], "question")
    request = waves[1][0]
    assert request.prompt[-1:] == question
    assert request.forced == question
    assert request.prompt[: len(waves[0][0].prompt)] == waves[0][0].prompt, "a shared prefix"
    told = request.prompt[len(waves[0][0].prompt) : -1]
    assert told == [*numbers(samples[0], "question"), *numbers(samples[0], "gold")]


def test_agnostic_compression_sees_the_context_alone(tokenizer):
    aware, _ = ask(tokenizer)
    waves, _ = ask(tokenizer, question="agnostic")
    for seen, unseen in zip(chain(*aware), chain(*waves), strict=True):
        assert len(unseen.prompt) == 64
        assert unseen.prompt + unseen.forced == seen.prompt + seen.forced


def test_own_answers_take_the_place_of_the_true_ones(tokenizer):
    waves, samples = ask(tokenizer, answers="own")
    question = numbers(samples[0], "question")
    assert waves[1][0].prompt[64:-1] == [*question, *question, *OWN]


def test_single_requests_find_their_context_encoded_and_no_history(tokenizer):
    waves, _ = ask(tokenizer, mode="multi-request")
    encoded, *asked = waves
    assert [len(request.prompt) for request in encoded] == [64, 64]
    assert all(len(request.prompt) == 65 for wave in asked for request in wave)
    assert len(asked) == 3


def test_losses_force_the_true_answer(tokenizer):
    waves, samples = ask(tokenizer, losses=True)
    first, forced = waves[0][0], waves[1][0]
    assert forced.key == "kvplug_recall/0/loss"
    assert forced.prompt == first.prompt
    assert forced.forced == first.forced + numbers(samples[0], "gold")
    assert (forced.scored, forced.new_tokens) == (3, 0)


def test_documents_of_other_tasks_are_plain_prompts_whatever_they_hold(tokenizer):
    """LongBench's have a context, others a turn or a gold."""
    from lm_eval.api.instance import Instance

    engine = Asked()
    lm = KVPlugVLLM(tokenizer, engine=engine, max_num_seqs=2)
    docs = [{"context": "k1", "turn": "first", "gold": 0}, {"context": "k1", "turn": 3}]
    requests = [
        Instance(
            request_type="generate_until",
            doc=doc,
            arguments=("k1 k2", {"until": ["k9"], "max_gen_toks": 4}),
            idx=0,
            metadata=("other", number, 1),
        )
        for number, doc in enumerate(docs)
    ]
    lm.generate_until(requests)
    (wave,) = engine.waves
    assert [(r.key, r.prompt, r.forced, r.new_tokens) for r in wave] == [
        ("other/0", [1, 2], [], 4),
        ("other/1", [1, 2], [], 4),
    ]


def test_what_the_journal_has_is_not_asked_again(tokenizer, tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    whole, samples = ask(tokenizer, journal=journal)
    kept = Journal(tmp_path / "journal.jsonl")
    for key in ("kvplug_recall/4", "kvplug_recall/2", "kvplug_recall/5"):
        del kept.replies[key]
    waves, again = ask(tokenizer, journal=kept)
    assert [s["filtered_resps"] for s in again] == [s["filtered_resps"] for s in samples]
    encoded, *asked = waves
    # A new engine sees what was said so far before it goes on.
    assert encoded[0].prompt == whole[1][1].prompt[:-1]
    flat = [r.key for wave in asked for r in wave if len(r.forced)]
    assert flat == ["kvplug_recall/4", "kvplug_recall/2", "kvplug_recall/5"]
