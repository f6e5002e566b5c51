"""The lm-eval model class: forced decoding tells what the model itself thinks of an answer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # of lm-eval and vLLM
]

from kvplug_evals.engines.interface import (  # noqa: E402
    EngineError,
    EngineOptions,
    Request,
)
from kvplug_evals.engines.start import start_engine  # noqa: E402
from kvplug_evals.models.recall import recall_prompt, word  # noqa: E402
from tests.pace import Pace  # noqa: E402

RECALL = Path(__file__).parents[2] / ".models" / "recall"


@pytest.fixture(scope="module")
def prompt():
    return recall_prompt(800, 100, 2, seed=3, hops=4, disjoint=True)


@pytest.fixture(scope="module")
def instances(prompt):
    from lm_eval.api.instance import Instance

    question, answers = prompt.questions[0], prompt.answers[0]
    wrong = [answers[0], prompt.answers[1][0], answers[2]]
    return [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(f"{prompt.text} {word(question)}", " ".join(map(word, said))),
            idx=0,
            metadata=("mine", number, 1),
        )
        for number, said in enumerate((answers, wrong))
    ]


@pytest.fixture(scope="module")
def answered(instances):
    """What dense and a policy make of both, by policy."""
    from kvplug_evals.lm import KVPlugVLLM

    found = {}
    for policy in ("dense", "streaming_llm(sinks=32, window=64)"):
        Pace.starts += 1
        lm = KVPlugVLLM(
            str(RECALL), policy=policy, max_model_len=1024, kv_cache_mib=64, dtype="float32"
        )
        try:
            found[policy] = lm.loglikelihood(instances)
            with pytest.raises(NotImplementedError, match="loglikelihood or generate_until"):
                lm.loglikelihood_rolling([])
        finally:
            lm.close()
    return found


@torch.inference_mode()
def expected(instance):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    model = AutoModelForCausalLM.from_pretrained(RECALL).eval()
    context, said = (tokenizer(text).input_ids for text in instance.args)
    logits = model(torch.tensor([context + said])).logits[0, len(context) - 1 : -1]
    told = logits.log_softmax(-1)[torch.arange(len(said)), torch.tensor(said)]
    return float(told.sum())


def test_dense_gives_the_models_own_log_likelihoods(answered, instances):
    (right, greedy), (wrong, not_greedy) = answered["dense"]
    assert right == pytest.approx(expected(instances[0]), abs=0.05)
    assert wrong == pytest.approx(expected(instances[1]), rel=0.01)
    assert greedy
    assert not not_greedy
    assert wrong < right - 5


def test_a_policy_that_lost_the_answer_shows_in_the_loss(answered):
    (dense, _), _ = answered["dense"]
    (lost, greedy), _ = answered["streaming_llm(sinks=32, window=64)"]
    assert lost < dense - 5, "a prefill-only likelihood would not have moved"
    assert not greedy


def test_what_the_engine_would_cut_short_is_refused_or_goes_on(tmp_path):
    """vLLM stops at its length, and at an end token, without a word: an answer, or the loss of
    one, would be a part.
    """
    model = tmp_path / "recall"
    shutil.copytree(RECALL, model)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((RECALL / name).read_text()) if (RECALL / name).exists() else {}
        (model / name).write_text(json.dumps({**config, "eos_token_id": 2}))
    options = EngineOptions(
        model=str(model),
        max_model_len=256,
        max_num_seqs=2,
        kv_cache_mib=64,
        multiprocess=False,
        dtype="float32",
    )
    fits = Request(key="fits", prompt=[1] * 240, forced=[2] * 10, new_tokens=6, scored=10)
    engine = start_engine("vllm", "dense", options)
    try:
        (reply,) = engine.run([fits]).replies
        assert (len(reply.losses), len(reply.tokens)) == (10, 6)
        engine.ends = frozenset(reply.tokens[2:3])
        (ended,) = engine.run([replace(fits, key="ended")]).replies
        assert ended.tokens == reply.tokens[: reply.tokens.index(reply.tokens[2]) + 1]
        with pytest.raises(EngineError, match=r"long needs 257 tokens .* 256; give max_model_len"):
            engine.run([replace(fits, key="long", new_tokens=7)])
    finally:
        engine.close()


def test_wrong_options_are_refused():
    from kvplug_evals.lm import KVPlugVLLM

    with pytest.raises(ValueError, match="question must be aware or agnostic, got 'both'"):
        KVPlugVLLM(str(RECALL), question="both")
