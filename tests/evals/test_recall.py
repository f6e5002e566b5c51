"""The recall model recalls, and what is promised of a policy follows from the model's own keys."""

import pytest
import torch

from kvplug_evals.models.recall import (
    build_recall_model,
    match_keys,
    match_queries,
    promised_recall,
    reachable,
    recall_prompt,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "recall"
    build_recall_model(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@torch.inference_mode()
def decode(model, prompt, question):
    """Prefill, then one token at a time, as an engine does. Returns tokens and the match keys."""
    cache, token, generated = None, None, []
    for _ in prompt.answers[0]:
        tokens = [*prompt.tokens, question] if cache is None else [token]
        out = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
        cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
        generated.append(token)
    return generated, cache.layers[1].keys[0, 0]


@pytest.mark.parametrize("tokens, pairs", [(1024, 512), (4096, 1000)])
def test_dense_attention_recalls_everything(model, tokens, pairs):
    prompt = recall_prompt(tokens, pairs, queries=8, seed=tokens, hops=4)
    for question, answers in zip(prompt.questions, prompt.answers, strict=True):
        generated, _ = decode(model, prompt, question)
        assert generated == answers
        assert all(prompt.hits(question, generated))


def test_predicted_keys_are_the_cached_keys(model):
    prompt = recall_prompt(1024, 100, queries=1, seed=1, hops=3)
    generated, cached = decode(model, prompt, prompt.questions[0])
    seen = [*prompt.tokens, prompt.questions[0], *generated[:-1]]
    torch.testing.assert_close(match_keys(seen), cached, atol=5e-3, rtol=0)


def test_an_answer_outscores_every_other_token():
    prompt = recall_prompt(4096, 1000, queries=32, seed=2)
    queries = match_queries(prompt.questions, [len(prompt.tokens)] * 32)
    scores = queries @ match_keys(prompt.tokens).T
    assert scores.argmax(-1).tolist() == [row[0] for row in prompt.positions]


def test_positions_hold_the_answers():
    prompt = recall_prompt(2000, 300, queries=20, seed=3, hops=5)
    for question, answers, at in zip(
        prompt.questions, prompt.answers, prompt.positions, strict=True
    ):
        assert [prompt.tokens[p - 1] for p in at] == [question, *answers[:-1]]
        assert [prompt.successor[k] for k in (question, *answers[:-1])] == answers
        assert all(prompt.tokens.count(question_token) == 1 for question_token in answers)


def test_a_budget_of_everything_promises_everything():
    prompt = recall_prompt(1000, 100, queries=8, seed=4, hops=3)
    assert promised_recall(prompt, page_size=16, budget=1024).all()
    assert reachable(prompt, sinks=0, window=1003).all()


def test_a_larger_budget_never_promises_less():
    prompt = recall_prompt(4096, 200, queries=16, seed=5, hops=2)
    small, large = (promised_recall(prompt, page_size=16, budget=b) for b in (256, 1024))
    assert (large | ~small).all()
    assert small.float().mean() < large.float().mean()


def test_a_window_reaches_its_share():
    prompt = recall_prompt(4096, 1000, queries=500, seed=6)
    reached = reachable(prompt, sinks=4, window=1020)
    assert reached.float().mean().item() == pytest.approx(1024 / 4096, abs=0.05)
    for (answer,), (found,) in zip(prompt.positions, reached.tolist(), strict=True):
        assert found == (answer < 4 or answer >= 4097 - 1020)


def test_one_miss_is_one_miss():
    prompt = recall_prompt(1000, 100, queries=1, seed=7, hops=3)
    question, (first, second, third) = prompt.questions[0], prompt.answers[0]
    other = next(key for key in prompt.successor if key not in (question, first, second))
    assert prompt.hits(question, [first, second, third]) == [True, True, True]
    assert prompt.hits(question, [other, prompt.successor[other]]) == [False, True]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"tokens": 10, "pairs": 8}, "need 16 tokens"),
        ({"pairs": 5000}, "< 2048 symbols"),
        ({"queries": 0}, "queries must be between 1 and pairs"),
    ],
)
def test_impossible_prompts_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        recall_prompt(**{"tokens": 1000, "pairs": 100, "queries": 4, "seed": 0, **wrong})


def test_the_tokenizer_is_a_word_per_token(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("k1 v2047 k9").input_ids == [1, 4095, 9]
    assert tokenizer.decode([1, 4095, 9]) == "k1 v2047 k9"


@pytest.mark.parametrize(
    "heads",
    [{"kv_heads": 4, "group": 2, "live": (1, 3)}, {"kv_heads": 2, "group": 8, "live": (1,)}],
)
def test_live_heads_share_the_answer_and_idle_ones_do_nothing(heads, tmp_path):
    transformers = pytest.importorskip("transformers")
    build_recall_model(tmp_path / "m", **heads)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    prompt = recall_prompt(1024, 100, queries=4, seed=8, hops=3)
    for question, answers in zip(prompt.questions, prompt.answers, strict=True):
        generated, _ = decode(model, prompt, question)
        assert generated == answers
    # Without what one live head copies the answer is no longer sure; an idle head's is nothing.
    output = model.model.layers[1].self_attn.o_proj.weight.data
    width, group = 128, heads["group"]
    idle = next(h for h in range(heads["kv_heads"]) if h not in heads["live"])
    assert not output[:, idle * group * width : (idle + 1) * group * width].any()
    assert all(output[:, h * group * width :][:, :width].any() for h in heads["live"])


def test_distractors_are_pairs_that_nobody_asks_for():
    prompt = recall_prompt(2000, 100, queries=10, seed=9, hops=4, distractors=300, disjoint=True)
    assert len(prompt.successor) == 100
    pairs = sum(
        a < 2048 <= b for a, b in zip(prompt.tokens[::2], prompt.tokens[1::2], strict=True)
    )
    assert pairs >= 400
    told = [key for row in prompt.answers for key in row]
    assert len(set(told)) == len(told), "disjoint: no two answers share a key"


@pytest.mark.parametrize("live", [(), (2,), (0, 0)])
def test_live_heads_must_be_there(live, tmp_path):
    with pytest.raises(ValueError, match="live must name some of the 2 KV heads"):
        build_recall_model(tmp_path / "m", live=live)
