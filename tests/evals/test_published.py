"""What is published is what its answers say: the reports, and the summary's table of look-ups."""

import re
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from kvplug_evals.sweep.report import report
from kvplug_evals.sweep.results import PACKED, results

PUBLISHED = Path(__file__).parents[2] / "evals/results"
REPORTS = sorted(file.parent.name for file in PUBLISHED.glob("*/report.md"))


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_what_its_answers_say(name):
    published = (PUBLISHED / name / "report.md").read_text()
    plots = re.findall(r"!\[.*?\]\((.*?)\)", published)
    assert report(PUBLISHED / name, plots) == published
    beside = {file.name for file in (PUBLISHED / name).iterdir()}
    assert beside == {"report.md", PACKED, *plots}


def test_no_path_of_a_machine_is_published():
    for file in PUBLISHED.rglob("*"):
        if file.suffix in (".md", ".jsonl"):
            assert "--out /" not in file.read_text(), file


def test_a_listing_is_short():
    assert len(REPORTS) == 9
    assert len([file for file in PUBLISHED.rglob("*") if file.is_file()]) < 45


SHARES = (0.125, 0.25, 0.5)
LENGTHS = (2048, 8192, 32768)
SNAPKV = "snapkv(budget={budget}, sinks=0, window=64, pool=5)"
# A row of the summary's table of look-ups -> the line it is of, and whether it sees the question.
ROWS = {
    "quest (reads the share)": ("quest(budget={budget}, dense_layers=0)", "aware"),
    "quest, top_p=0.9 (reads up to it)": (
        "quest(budget={budget}, top_p=0.9, dense_layers=0)",
        "aware",
    ),
    "snapkv, question in view": (SNAPKV, "aware"),
    "snapkv, context alone": (SNAPKV, "agnostic"),
    "snapkv + quest (reads half of it), in view": (
        SNAPKV + " + quest(budget={half}, dense_layers=0)",
        "aware",
    ),
    "pyramid(snapkv), in view": (f"pyramid({SNAPKV}, beta=20)", "aware"),
    "keydiff": ("keydiff(budget={budget}, sinks=4, window=0)", "aware"),
    "knorm": ("knorm(budget={budget}, sinks=4, window=0)", "aware"),
    "streaming_llm": ("streaming_llm(sinks=32, window={window})", "aware"),
    "**random**": ("random(budget={budget}, sinks=4, window=0, seed=0)", "aware"),
    "vLLM's sliding window": ("engine(sliding_window={budget})", "aware"),
}


@cache
def look_ups() -> dict[tuple[str, int, str], float]:
    """Policy, tokens and question -> share of look-ups that come out right, in a conversation."""
    found = {}
    for result in results(PUBLISHED / "recall-cpu"):
        _, tokens, mode, question = result.place
        if mode == "multi-turn":
            shares = [row["agreement"] for row in result.rows]
            found[result.policy, tokens, question] = sum(shares) / len(shares)
    return found


@pytest.mark.parametrize("row", ROWS)
def test_the_summarys_look_ups_are_those_of_the_answers(row):
    template, question = ROWS[row]
    text = (PUBLISHED / "README.md").read_text()
    table = text.partition("| holds |\n")[2].partition("\n\n")[0].split("\n")
    (line,) = (line for line in table if line.startswith(f"| {row} | "))
    cells = iter(line.split("|")[2:11])
    for tokens in LENGTHS:
        for share in SHARES:
            budget, cell = round(tokens * share), next(cells).strip()
            policy = template.format(budget=budget, half=budget // 2, window=budget - 32)
            value = look_ups().get((policy, tokens, question))
            if value is None:
                assert cell == ""
            else:  # a half is rounded to either side
                assert float(cell.removesuffix(" %")) == pytest.approx(100 * value, abs=0.501)


TOKENS = {
    "twilight, 1/16 of the tokens": "twilight(budget=0.0625, bits=2, dense_layers=0)",
    "twilight, 1/32 of the tokens": "twilight(budget=0.03125, bits=2, dense_layers=0)",
    "twilight, 1/16, keys in one bit": "twilight(budget=0.0625, bits=1, dense_layers=0)",
    "twilight, 1/16, keys in four bits": "twilight(budget=0.0625, bits=4, dense_layers=0)",
    "twilight, top_p=0.95, at most 1/4": (
        "twilight(budget=0.25, top_p=0.95, bits=2, dense_layers=0)"
    ),
    "quest, 1/8 of the tokens": "quest(budget=0.125, dense_layers=0)",
}


@pytest.mark.parametrize("row", [*TOKENS, "**random**"])
def test_the_table_at_equal_bytes_is_what_the_answers_say(row):
    lines = (PUBLISHED / "README.md").read_text().splitlines()
    printed = next(line for line in lines if (line.startswith(f"| {row} | ") and "more" in line)
                   or line.startswith(f"| {row} | 15.6"))  # fmt: skip
    _, found, right, longer, right_longer = (each.strip() for each in printed.split("|")[2:7])
    for tokens, share, answers in ((2048, found, right), (8192, longer, right_longer)):
        wanted = TOKENS.get(row, f"random(budget={tokens * 5 // 32}, sinks=4, window=0, seed=0)")
        (result,) = [
            each
            for each in results(PUBLISHED / "recall-tokens-cpu")
            if each.policy == wanted and each.config["tokens"] == tokens
        ]
        rows = result.of_task("kvplug_recall")
        look_ups, answered = (
            sum(row[name] for row in rows) / len(rows) for name in ("agreement", "fixed")
        )
        assert float(share.removesuffix(" %")) == pytest.approx(100 * look_ups, abs=0.501)
        assert float(answers) == pytest.approx(answered, abs=0.00501)
