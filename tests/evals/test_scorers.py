"""Both kinds of score on hand-made answers, and on answers that tell the two apart."""

import pytest

pytest.importorskip("nltk")
pytest.importorskip("rouge_score")

from kvplug_evals.scbench.functions import first_function
from kvplug_evals.scbench.scorers import METRICS, score

ADD = "def add(a, b):\n    total = a + b\n    check(total)\n    return total"
SUB = "def sub(a, b):\n    rest = a - b\n    report(rest)\n    return rest"
COMMENTED = (
    'def add(a, b):\n    """Adds the two and checks what comes out of it, at length."""\n'
    "    # first the sum of both of the arguments that were given\n"
    "    total = a + b\n    check(total)  # may raise\n    return total"
)
UUID = "0b5cbbd8-5d0a-4d2c-9c2b-2a5a5f0f8a11"


@pytest.mark.parametrize(
    "metric, prediction, answer, options, compat, fixed",
    [
        # Both agree.
        ("kv", f'{UUID}"', UUID, (), 1, 1),
        ("kv", "I do not know", UUID, (), 0, 0),
        ("vt", "AAAAA, BBBBB", ["AAAAA", "BBBBB"], (), 1, 1),
        ("vt", "aaaaa and CCCCC", ["AAAAA", "BBBBB"], (), 0.5, 0.5),
        ("mf", " 42.", 42, (), 1, 1),
        ("mf", "none", 42, (), 0, 0),
        ("mf", "2.5", 2.5, (), 1, 1),
        ("passkey", " 71432. Remember", "71432", (), 1, 1),
        ("qa_eng", "Paris", ["Paris"], (), 1, 1),
        ("qa_eng", "paris", "Paris", (), 1, 1),
        ("qa_chn", "红色。", ["红色"], (), 1, 1),
        ("qa_chn", "红", ["红色"], (), 2 / 3, 2 / 3),
        ("choice_eng", "B", "B", ("w", "x", "y", "z"), 1, 1),
        ("choice_eng", "The answer is: C", "B", ("w", "x", "y", "z"), 0, 0),
        ("many_shot", "animal", ["animal"], (), 1, 1),
        ("repoqa", ADD, ADD, (ADD, SUB), 1, 1),
        ("repoqa", f"```python\n{ADD}\n```", ADD, (ADD, SUB), 1, 1),
        ("repoqa", SUB, ADD, (ADD, SUB), 0, 0),
        ("repoqa", "", ADD, (ADD, SUB), 0, 0),
        ("summary", "The cat sat.", "The cat sat.", (), 1, 1),
        ("recall", "k1 k2 k9 k4", "k1 k2 k3 k4", (), 0.75, 0.75),
        ("recall", "", "k1 k2", (), 0, 0),
        # They differ.
        ("kv", f"x{UUID}9", UUID, (), 1, 0),
        ("vt", "XAAAAAX", ["AAAAA"], (), 1, 0),
        ("vt", "AAAAA", ["AAAAA", "BBBBB", "CCCCC"], (), 0.33, 1 / 3),
        ("mf", "-42", 42, (), 1, 0),
        ("mf", "3.7", 3, (), 1, 0),
        ("mf", "1,024", 1024, (), 0, 1),
        ("mf", "42,43", 42, (), 1, 1),
        ("mf", "42,43", 4243, (), 0, 0),
        ("mf", "1,024,43", 1024, (), 0, 1),
        ("mf", "[3,141, 12,5]", 3141, (), 0, 1),
        ("mf", "-1,024.5", -1024.5, (), 0, 1),
        ("passkey", "71432", 71432, (), 0, 1),
        ("many_shot", "a place", "animal", (), 1, 0),
        ("qa_eng", "in the city of Lima", "Paris", (), 0, 0),
        ("qa_chn", "红色。", "红色", (), 2 / 3, 1),
        ("qa_chn", "《红》", ["红"], (), 2 / 3, 1),
        ("vt", "CABLE", "AB", (), 1, 0),
        ("qa_eng", "It was Paris", ["Paris"], (), 1, 0.5),
        ("choice_eng", "According to the text, B", "B", ("w", "x", "y", "z"), 0, 1),
        ("choice_eng", "A friend says C", "A", ("w", "x", "y", "z"), 1, 0),
        ("repoqa", COMMENTED, ADD, (ADD, SUB), 0, 1),
        ("repoqa", f"```\n{ADD}", ADD, (ADD, SUB), 1, 1),
        # The first function of the first block that has one.
        ("repoqa", f"```python\n{ADD}\n\n\n{SUB}\n```", ADD, (ADD, SUB), 1, 1),
        ("repoqa", f"```python\n{ADD}\n\n\n{SUB}\n```", SUB, (ADD, SUB), 0, 0),
        ("repoqa", f"```sh\nls\n```\nThere:\n```python\n{ADD}\n```", ADD, (ADD, SUB), 1, 1),
        ("repoqa", f"```python\nclass C:\n    {ADD}\n    x = 1\n```", ADD, (ADD, SUB), 0, 0),
        ("repoqa", f"{ADD}\n\n\n{SUB}", ADD, (ADD, SUB), 0, 0),
        ("repoqa", "```\n1 + 1\n```", ADD, (ADD, SUB), 0, 0),
    ],
)
def test_scores(metric, prediction, answer, options, compat, fixed):
    assert score(metric, prediction, answer, options) == pytest.approx((compat, fixed))


PYTHON = "def f(\n    a,\n):\n    return a"
RUST = "pub fn f(a: i32) -> i32 {\n    if a > 1 { a } else { 1 }\n}"
TYPESCRIPT = "function f<T>(a: T): T {\n  return a;\n}"
GO = "func f(a int) (int, error) {\n\treturn a, nil\n}"
JAVA = "public static int f(int a) throws E {\n    if (a) { h(); }\n    return a;\n  }"
CPP = "int *f(const std::map<int, int> &a)\n{\n  return 0;\n}"


@pytest.mark.parametrize(
    "before, function, after",
    [
        ("import os\n\n@cache\n", PYTHON, "\n\nx = f(1)"),
        ("import os\n\n@cache\n", PYTHON, "\n\nx = f("),
        ("struct A;\n", RUST, "\nfn g() {}"),
        ("export ", TYPESCRIPT, "\n"),
        ('import ("fmt")\n\n', GO, "\n\nfunc g() {}"),
        ("class A {\n  int x = g(1);\n  ", JAVA, "\n}"),
        ("#include <map>\n", CPP, "\nint main() {}"),
    ],
)
def test_the_first_function_is_found_in_every_language_of_repoqa(before, function, after):
    said = f"Here:\n```\n{before}{function}{after}\n```"
    assert first_function(said, cut_short=False) == function


def test_a_summary_in_another_order_keeps_its_sentences():
    said = "The dog ran far. The cat sat still."
    compat, fixed = score("summary", said, "The cat sat still. The dog ran far.", ())
    assert compat < fixed == 1


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_shares(metric):
    answer = {"mf": 3, "vt": ["AB", "CD"], "passkey": "7"}.get(metric, "AB CD")
    for prediction in ("", "AB CD", "3 7 nothing", "B", "\n\n", '"{}'):
        for value in score(metric, prediction, answer, ("AB CD", "x", "y", "z")):
            assert 0 <= value <= 1
