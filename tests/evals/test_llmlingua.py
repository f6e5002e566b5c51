"""LLMLingua-2 as its own package does it, with a small random model in place of the hub's."""

import json
import string
from dataclasses import replace

import pytest
import torch

from kvplug_evals.llmlingua import parse_compressor
from kvplug_evals.scbench.documents import documents
from kvplug_evals.sweep.settings import expand, read_suite

transformers = pytest.importorskip("transformers")

LINE = "llmlingua(rate=0.5)"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Words by letters, kept or dropped at random."""
    folder = tmp_path_factory.mktemp("models") / "small-bert-base-multilingual-cased"
    folder.mkdir()
    letters = list(string.printable.strip())
    vocabulary = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizerFast(
        vocab=str(folder / "vocab.txt"), do_lower_case=False
    )
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), num_hidden_layers=1, initializer_range=1.0, **shape
    )
    torch.manual_seed(0)
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_download(monkeypatch):
    """The package counts OpenAI's tokens for a price that it prints; their table is a download."""
    tiktoken = pytest.importorskip("tiktoken")
    letters = {bytes([byte]): byte for byte in range(256)}
    table = tiktoken.Encoding("letters", pat_str=".", mergeable_ranks=letters, special_tokens={})
    monkeypatch.setattr("tiktoken.encoding_for_model", lambda name: table)


@pytest.mark.usefixtures("no_download")
def test_the_package_keeps_the_share_that_was_asked_for_in_order(model):
    pytest.importorskip("llmlingua")
    context = " ".join(f"Key number {i} opens door {i * 7 % 31}." for i in range(300))
    sizes = []
    for rate in (0.25, 0.5, 1.0):
        kept = parse_compressor(f"llmlingua(rate={rate}, model={model})").compress(context)
        rest = iter(context)
        assert all(letter in rest for letter in kept if letter != " "), "nothing new, in order"
        sizes.append(len(kept) / len(context))
    assert sizes == pytest.approx([0.25, 0.5, 1.0], abs=0.1)


@pytest.mark.usefixtures("no_download")
def test_documents_lose_context_and_no_question(model):
    pytest.importorskip("llmlingua")
    options = {"task": "kv", "pretrained": str(model), "tokens": 2048, "contexts": 2}
    options |= {"turns": 2, "pairs": 30, "vocabulary": "words"}
    whole = documents(**options)["test"]
    packed = documents(**options, compressor=f"llmlingua(rate=0.5, model={model})")["test"]
    assert len(whole) == len(packed) == 4
    for one, other in zip(whole, packed, strict=True):
        assert len(other["context"]) < 0.75 * len(one["context"])
        assert (one["question"], one["gold"]) == (other["question"], other["gold"])
        assert json.loads(one["history"]) == json.loads(other["history"])


def test_a_line_is_read_as_it_is_printed(model):
    pytest.importorskip("llmlingua")
    for line in (LINE, f"llmlingua(rate=0.25, model={model})"):
        assert str(parse_compressor(line)) == line
    suite = replace(read_suite("recall"), tokens=(512,), modes=("multi-turn",))
    setting = expand(suite, "vllm", [LINE], baselines=True)[-1]
    assert (setting.policy, setting.compressor, setting.engine_policy) == (LINE, True, "dense")


@pytest.mark.parametrize(
    "line, message",
    [
        ("llmlingua(0.5)", r"write llmlingua\(rate=0.5\) .*got 'llmlingua\(0.5\)'"),
        ("llmlingua(rate=2)", "a share above 0 and up to 1; got rate=2"),
        ("llmlingua(rate=1.2.3)", "got rate=1.2.3"),
        (
            "llmlingua(rate=0.5, model=gpt2)",
            "whose name holds .*xlm-roberta-large; got model=gpt2",
        ),
    ],
)
def test_a_wrong_line_says_what_to_write(line, message):
    with pytest.raises(ValueError, match=message):
        parse_compressor(line)


def test_it_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("kvplug_evals.llmlingua.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install llmlingua"):
        expand(read_suite("recall"), "vllm", [LINE], baselines=True)


def test_prompts_that_it_cannot_reach_are_refused():
    with pytest.raises(ValueError, match=r"ruler_vt comes with prompts of its own"):
        expand(read_suite("ruler"), "vllm", [LINE], baselines=True)
