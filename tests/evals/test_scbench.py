"""SCBench's tasks: three sources by one path, exact lengths, seeded, and what a file may hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("datasets")

from kvplug_evals.models.folder import write_word_tokenizer
from kvplug_evals.scbench.documents import documents, history, process_results, text
from kvplug_evals.scbench.generators import GENERATORS, Order, make
from kvplug_evals.scbench.schema import read_jsonl
from kvplug_evals.scbench.tasks import TASKS, asks, load, source, task_named, truncated

TASK_FILES = Path(__file__).parents[2] / "evals/tasks/scbench"
SCBENCH = [name for name, task in TASKS.items() if task.scbench]


def words(text):
    """A stand-in for a tokenizer's count: about four characters a token."""
    return len(text) // 4


def order(**options):
    return Order(**{"tokens": 3000, "turns": 5, "count": words, **options})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_word_tokenizer(folder, ["?", "apple", "pear"])
    return str(folder)


def test_there_are_the_twelve_tasks_of_scbench():
    assert len(SCBENCH) == 12
    assert set(GENERATORS) == set(TASKS) - {"qa_chn"}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_context_is_as_long_as_asked_and_the_same_every_time(name):
    count = (lambda text: len(text.split())) if name == "recall" else words
    made = make(name, order(count=count))
    assert made == make(name, order(count=count))
    assert made != make(name, order(count=count, seed=1))
    assert 0.9 * 3000 <= count(made.context) <= 3000
    assert len(made.turns) == 5


@pytest.mark.parametrize("tokens", [1000, 131072])
def test_lengths_reach_from_1k_to_128k(tokens):
    assert 0.98 * tokens <= words(make("kv", order(tokens=tokens)).context) <= tokens


@pytest.mark.parametrize(
    "name, options, tokens",
    [("kv", {"vocabulary": "words"}, 70_000), ("repoqa", {"turns": 3}, 15_000)],
)
def test_a_context_may_take_most_of_what_there_is(name, options, tokens):
    """More than half of all pairs of words, and of the standard library's functions."""
    made = make(name, order(tokens=tokens, **options))
    assert 0.97 * tokens <= words(made.context) <= tokens
    with pytest.raises(
        ValueError, match=r"the longest such context has \d+ tokens, .*ask for fewer"
    ):
        make(name, order(tokens=10 * tokens, **options))


@pytest.mark.parametrize("name", ["kv", "prefix_suffix", "qa_eng", "needle", "repoqa"])
def test_every_answer_stands_in_its_context(name):
    made = make(name, order())
    for turn in made.turns:
        assert made.context.count(turn.gold) == 1


def test_kv_is_a_json_object_of_uuid_pairs():
    made = make("kv", order())
    data = json.loads(made.context[made.context.index("{") :])
    for turn in made.turns:
        key = turn.cue.split('"')[1]
        assert data[key] == turn.answer
        assert len(key) == len(turn.answer) == 36


def test_prefix_and_suffix_name_one_string():
    made = make("prefix_suffix", order())
    strings = made.context.split("\n")[1:]
    for turn in made.turns:
        first, last = turn.answer[:6], turn.answer[-6:]
        assert first in turn.input
        assert last in turn.input
        assert [s for s in strings if s.startswith(first) and s.endswith(last)] == [turn.answer]


def test_variables_are_assigned_before_they_are_taken():
    made = make("vt", order(hops=4))
    values = {}
    for line in made.context.split("\n"):
        if line.startswith("VAR "):
            name, value = line[4:].split(" = ")
            values[name] = values[value[4:]] if value.startswith("VAR ") else value
    for turn in made.turns:
        wanted = next(word for word in turn.input.split() if word.isdigit())
        assert sorted(turn.answer) == sorted(n for n, v in values.items() if v == wanted)
        assert len(turn.answer) == 5


def test_statistics_are_those_of_the_array():
    made = make("mf", order())
    numbers = sorted(json.loads(made.context.removeprefix("List: ")))
    middle = numbers[len(numbers) // 2]
    wanted = [numbers[-1], numbers[0], middle, numbers[-2], numbers[1]]
    assert [turn.answer for turn in made.turns] == wanted


@pytest.mark.parametrize("half_as_many", [200, 2_000, 20_000])
def test_an_answer_of_mf_fits_its_new_tokens(half_as_many):
    """Where a digit is a token, as in SmolLM2 and Llama 2, and the space before it."""
    made = make("mf", order(tokens=2 * half_as_many, count=lambda text: text.count(",")))
    numbers = sorted(json.loads(made.context.removeprefix("List: ")))
    assert [turn.answer for turn in made.turns][:2] == [numbers[-1], numbers[0]]
    for ask in asks(TASKS["mf"], made, 5):
        assert len(ask.gold) <= ask.new_tokens


def test_mixed_tasks_score_each_turn_as_its_own():
    for name, metrics in (
        ("summary_with_needles", ["passkey", "summary", "passkey", "summary", "passkey"]),
        ("repoqa_and_kv", ["repoqa", "kv", "repoqa", "kv", "repoqa"]),
    ):
        assert [ask.metric for ask in asks(TASKS[name], make(name, order()), 5)] == metrics


def test_a_turn_of_an_unknown_task_is_refused():
    made = make("kv", order())
    turns = (replace(made.turns[0], task="scbench_kvs"),)
    with pytest.raises(ValueError, match=r"must be repoqa, kv, .*got 'scbench_kvs'"):
        list(asks(TASKS["kv"], replace(made, turns=turns), 5))
    alone = next(asks(TASKS["summary"], make("summary", order()), 1))
    assert alone.new_tokens == TASKS["summary"].new_tokens


def test_the_letter_is_that_of_the_right_option():
    made = make("choice_eng", order())
    for turn, ask in zip(made.turns, asks(TASKS["choice_eng"], made, 5), strict=True):
        right = turn.options["ABCD".index(turn.answer)]
        assert f"was left in {right}." in made.context
        assert f"{turn.answer}. {right}\n" in ask.question


def test_stand_ins_say_so():
    assert source("kv", "generated") == "exact recipe"
    assert source("kv", "generated", "words") == "exact recipe but for words instead of UUIDs"
    assert source("vt", "generated", "words") == "exact recipe"
    assert source("qa_eng", "generated") == "stand-in"
    assert source("qa_eng", "hub").startswith("microsoft/SCBench, scbench_qa_eng, instructions")
    with pytest.raises(ValueError, match="qa_chn has no generator"):
        make("qa_chn", order())


HAND_MADE = """\
{"id": 7, "context": "apple is red. pear is green.", "multi_turns": [\
{"input": "What colour is an apple?", "answer": "red"}, \
{"input": "And a pear?", "answer": ["green", "yellow"]}]}

{"context": "1 2 3", "multi_turns": [{"input": "The largest number is", "answer": 3}]}
"""


PUBLISHED = {
    "kv": {
        "id": 0,
        "context": 'JSON data:\n{"a1": "b2", "c3": "d4"}',
        "multi_turns": [
            {"answer": "b2", "input": 'Key: "a1"\nThe value of this key is: '},
            {"answer": "d4", "input": 'Key: "c3"\nThe value of this key is: '},
        ],
    },
    "prefix_suffix": {
        "context": "abcd, efgh",
        "multi_turns": [{"answer": "abcd", "input": "Prefix: a, suffix: d. String:"}],
    },
    "vt": {
        "context": "VAR A = 1. VAR B = A.",
        "multi_turns": [{"answer": ["A", "B"], "input": "Variables with 1, one a line:"}],
    },
    "mf": {
        "id": 3,
        "context": [7, 1, 12],
        "multi_turns": [
            {"answer": 12, "input": "Answer with a number. The largest number of the list is: "},
            {"answer": 1, "input": "Answer with a number. The smallest number of the list is: "},
        ],
    },
    "many_shot": {
        "id": 4,
        "task": "some_task",
        "context": "Q: 1 + 1\nA: (B)",
        "multi_turns": [{"answer": "(A)", "input": "Q: 1 + 2\nA:"}],
    },
    "choice_eng": {
        "id": 5,
        "context": "Ann met Bob.",
        "multi_turns": [
            {"answer": "Bob", "input": "Whom did Ann meet?", "options": ["Al", "Bob", "Cy", "Di"]}
        ],
    },
    "qa_chn": {
        "id": 6,
        "context": "安遇见了鲍勃。",
        "multi_turns": [{"answer": "鲍勃", "input": "安遇见了谁？"}],
    },
    "repoqa_and_kv": {
        "id": 7,
        "lang": "python",
        "repo": "a/b",
        "context": "def f():\n    return 1\n\n{...}",
        "multi_turns": [
            {
                "answer": "def f():\n    return 1",
                "input": "It returns one.",
                "name": "f",
                "task": "scbench_repoqa",
            },
            {"answer": "d4", "input": "The value of c3 is: ", "name": None, "task": "scbench_kv"},
        ],
    },
    "summary_with_needles": {
        "id": 8,
        "context": "A long text. The pass key is 71432.",
        "multi_turns": [
            {"answer": "A text.", "input": "Summarize it.", "task": "scbench_summary"},
            {"answer": "71432", "input": "The pass key is", "task": "scbench_passkey"},
        ],
    },
}
"""Rows with the fields and types of the hub's, from its data set card."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of the data set's name: datasets takes it for what it would download."""
    from datasets import Dataset

    root = tmp_path / "microsoft" / "SCBench"
    configs = []
    for task, row in PUBLISHED.items():
        file = root / f"scbench_{task}" / "test-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        Dataset.from_list([row, row]).to_parquet(file)
        path = f"scbench_{task}/test-*"
        files = [{"split": "test", "path": path}]
        configs.append({"config_name": f"scbench_{task}", "data_files": files})
    (root / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("task", PUBLISHED)
def test_rows_of_the_hub_are_put_in_words(task, tokenizer):
    docs = documents(task, data="hub", tokenizer=tokenizer, contexts=1)["test"]
    row = PUBLISHED[task]
    assert len(docs) == len(row["multi_turns"])
    for doc, turn in zip(docs, row["multi_turns"], strict=True):
        assert str(row["context"]) in doc["context"]
        assert turn["input"] in text(doc)
        assert doc["source"] == source(task, "hub")
        right = process_results(doc, [doc["gold"]])
        assert right["fixed"] == 1, "the true answer is right"
        assert process_results(doc, ["nothing of it"])["fixed"] == 0


@pytest.mark.usefixtures("hub")
def test_how_rows_of_the_hub_ask(tokenizer):
    def asked(task):
        docs = documents(task, data="hub", tokenizer=tokenizer, contexts=1)["test"]
        return docs[len(docs) - 1]

    kv = asked("kv")
    assert text(kv).startswith("Extract the value of a key")
    assert text(kv).endswith('b2"\n\nKey: "c3"\nThe value of this key is: "')
    assert json.loads(kv["until"]) == ['"', "\n"]
    mf = asked("mf")
    assert mf["context"] == "[7, 1, 12]"
    assert "What is the smallest number of the list?\n\nAnswer with" in mf["question"]
    assert (mf["cue"], mf["gold"], json.loads(mf["until"])) == ("", "1", [])
    choice = asked("choice_eng")
    assert choice["question"].endswith(
        "Question: Whom did Ann meet?\nA. Al\nB. Bob\nC. Cy\nD. Di\n"
    )
    assert (choice["cue"], choice["gold"]) == ("Answer:", " B")
    assert text(asked("qa_chn")).endswith("问题：安遇见了谁？\n答案：")
    assert asked("qa_chn")["gold"] == "鲍勃"
    vt = asked("vt")
    assert (vt["cue"], vt["gold"]) == ("", "\nA, B")


def test_functions_of_a_repository_are_rivals(tokenizer, tmp_path):
    def row(repo, name):
        turn = {"input": f"It is {name}.", "answer": f"def {name}(a, b): return a + b"}
        return {"context": "code", "repo": repo, "multi_turns": [turn]}

    file = tmp_path / "repoqa.jsonl"
    rows = [row("a/b", "add"), row("a/b", "added"), row("c/d", "other")]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    docs = documents("repoqa", data=str(file), tokenizer=tokenizer, contexts=1)["test"]
    assert sorted(json.loads(docs[0]["options"])) == [
        "def add(a, b): return a + b", "def added(a, b): return a + b"
    ]  # fmt: skip
    assert docs[0]["cue"] == "```\n"
    assert process_results(docs[0], ["def add(a, b): return a + b"])["compat"] == 1
    assert process_results(docs[0], ["def added(a, b): return a + b"])["compat"] == 0


def test_a_file_in_scbenchs_schema_is_accepted(tmp_path, tokenizer):
    file = tmp_path / "mine.jsonl"
    file.write_text(HAND_MADE)
    first, second = read_jsonl(file)
    assert first.id == "7"
    assert [turn.gold for turn in first.turns] == ["red", "green, yellow"]
    assert second.turns[0].answer == 3
    docs = documents("qa_eng", data=str(file), tokenizer=tokenizer, turns=2)["test"]
    assert [doc["turn"] for doc in docs] == [0, 1, 0]
    assert docs[1]["source"] == f"file {file}"
    assert text(docs[1]) == (
        "Read this book. Answer the questions in as few words as possible.\n\n"
        "apple is red. pear is green.\n\nQuestion: What colour is an apple?\nAnswer: red"
        "\n\nQuestion: And a pear?\nAnswer:"
    )
    assert process_results(docs[1], ["It is yellow"])["compat"] == 1


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected a JSON object"),
        (
            '{"multi_turns": []}',
            "line 2: context must be a text or a list of numbers, got nothing",
        ),
        ('{"context": "a", "multi_turns": {}}', "line 2: multi_turns must be a list"),
        (
            '{"context": "a", "multi_turns": [{"input": "b"}]}',
            r"line 2: multi_turns\[0\]: 'answer' is missing",
        ),
        (
            '{"context": "a", "multi_turns": [{"input": "b", "answer": null}]}',
            "answer must be a text, a number or a list of texts, got nothing",
        ),
        (
            '{"context": "a", "multi_turns": [{"input": "b", "answer": "c", "options": "d"}]}',
            "options must be a list of texts, got 'd'",
        ),
        (
            '{"context": "a", "multi_turns": [{"input": "b", "answer": NaN}]}',
            "line 2: not JSON: NaN is no number",
        ),
        (
            '{"context": "a", "multi_turns": [{"input": "b", "answer": [true]}]}',
            r"line 2: multi_turns\[0\]: answer must be a text, a number or a list of texts",
        ),
        ('{"context": "\udcff"}', "line 2: not JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(line, reason, tmp_path):
    file = tmp_path / "bad.jsonl"
    text = HAND_MADE.split("\n")[0] + "\n" + line + "\n"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=reason):
        read_jsonl(file)


@pytest.mark.parametrize(
    "task, turn, reason",
    [
        ("kv", {"answer": "c", "task": "scbench_kvs"}, "must be repoqa, .*got 'scbench_kvs'"),
        ("kv", {"answer": " "}, "answer is empty"),
        ("mf", {"answer": "twelve"}, "answer of mf must be a number, got 'twelve'"),
        ("mf", {"answer": "1.5"}, "answer of mf must be a number, got '1.5'"),
        ("choice_eng", {"answer": "e", "options": ["d"]}, "'e' is none of the options"),
        ("choice_eng", {"answer": "e", "options": [*"abcde"]}, "at most 4 options, got 5"),
    ],
)
def test_a_turn_that_its_task_cannot_put_or_score_is_refused_with_its_line(
    task, turn, reason, tmp_path, tokenizer
):
    good = {"context": "a", "multi_turns": [{"input": "b", "answer": "1"}]}
    bad = {"context": "a", "multi_turns": [*good["multi_turns"], {"input": "b", **turn}]}
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl, line 3: multi_turns\[1\]: .*{reason}"):
        documents(task, data=str(file), tokenizer=tokenizer, contexts=1)


@pytest.mark.parametrize("ids", [{"id": 0}, {"id": None}, {}])
def test_rows_that_share_an_id_are_two_conversations(ids, tmp_path, tokenizer):
    """Results are paired by it: they would be taken for the same questions."""
    turns = [{"input": "b", "answer": "c"}]
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{json.dumps({**ids, 'context': 'a', 'multi_turns': turns})}\n" * 2)
    docs = documents("kv", data=str(file), tokenizer=tokenizer)["test"]
    assert len(set(docs["conversation"])) == 2


def test_what_is_written_is_read_again(tmp_path):
    made = [make(name, order()) for name in ("kv", "vt", "choice_eng", "repoqa_and_kv")]
    file = tmp_path / "made.jsonl"
    file.write_text("".join(conversation.as_json() + "\n" for conversation in made))
    assert read_jsonl(file) == made
    assert load("kv", data=str(file), contexts=2, order=order()) == made[:2]


def test_long_contexts_lose_their_middle():
    context = "".join(chr(65 + i % 26) for i in range(10_000))
    short = truncated(context, 500, words)
    assert 480 <= words(short) <= 500
    assert context.startswith(short[:900])
    assert context.endswith(short[-900:])
    assert truncated("short", 500, words) == "short"


def test_later_turns_quote_the_true_answers_and_single_requests_do_not(tokenizer):
    options = {"tokenizer": tokenizer, "tokens": 200, "contexts": 2, "turns": 3}
    talk = documents("prefix_suffix", **options)["test"]
    alone = documents("prefix_suffix", **options, mode="multi-request")["test"]
    assert [doc["turn"] for doc in talk] == [0, 1, 2] * 2
    for before, now in zip(talk, list(talk)[1:], strict=False):
        if now["turn"]:
            assert text(now).startswith(text(before) + before["gold"])
    assert all(history(doc) == [] for doc in alone)
    assert [doc["question"] for doc in alone] == [doc["question"] for doc in talk]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"turns": 6}, "at most 5 turns"),
        ({"tokens": 0}, "tokens must be a positive number"),
        ({"mode": "chat"}, "mode must be multi-turn or multi-request"),
        ({"vocabulary": "word"}, "vocabulary must be uuid or words, got 'word'"),
        ({"tokens": 5}, "the shortest such context has"),
    ],
)
def test_impossible_orders_are_refused(wrong, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        documents("prefix_suffix", **{"tokenizer": tokenizer, "contexts": 1, **wrong})


def test_lengths_need_a_tokenizer():
    with pytest.raises(ValueError, match="give pretrained or tokenizer"):
        documents("kv")


@pytest.mark.parametrize("name", TASKS)
def test_the_yaml_file_is_the_task(name):
    lines = (TASK_FILES / f"{name}.yaml").read_text().replace("!function ", "")
    config, task = yaml.safe_load(lines), task_named(name)
    assert config["custom_dataset"] == f"data.{name}"
    assert config["generation_kwargs"]["max_gen_toks"] == task.new_tokens
    assert tuple(config["generation_kwargs"]["until"]) == task.until


def test_plain_lm_eval_finds_the_tasks(tokenizer):
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(
        include_path=str(TASK_FILES.parent),
        include_defaults=False,
        metadata={"pretrained": tokenizer, "tokens": 200, "contexts": 1, "turns": 2},
    )
    (task,) = manager.load(["scbench_prefix_suffix"])["tasks"].values()
    docs = list(task.test_docs())
    assert task.doc_to_text(docs[1]) == text(docs[1])
    assert task.process_results(docs[1], [docs[1]["gold"]]) == {"compat": 1.0, "fixed": 1.0}


@pytest.mark.parametrize("name", ["repoqa", "repoqa_and_kv"])
def test_an_answer_ends_the_code_block_that_its_prompt_began(name, tokenizer):
    """Where a model writes on behind the function, SCBench's block still has it first."""
    doc = documents(name, tokenizer=tokenizer, tokens=3000, contexts=1)["test"][0]
    answer = json.loads(doc["answer"])
    other = next(text for text in json.loads(doc["options"]) if text != answer)
    right = {"compat": 1, "fixed": 1}
    assert process_results(doc, [f"{answer}\n\n\n{other}\n"]) == right
    assert process_results(doc, [f"{other}\n\n\n{answer}\n"]) == {"compat": 0, "fixed": 0}
