"""Settings, journals, intervals and reports, without an engine."""

import contextlib
import json
import logging
import os
import re
import signal
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")

from kvplug_evals.cli import app
from kvplug_evals.engines.interface import EngineError, EngineOptions, Reply, Wave
from kvplug_evals.engines.start import start_engine
from kvplug_evals.interrupts import Interrupts
from kvplug_evals.models.recall import build_recall_model
from kvplug_evals.sweep.compare import as_table, compare
from kvplug_evals.sweep.journal import Journal
from kvplug_evals.sweep.plot import draw, family
from kvplug_evals.sweep.report import report, tables, write_report
from kvplug_evals.sweep.results import PACKED, pack, refusals, results
from kvplug_evals.sweep.session import (
    Run,
    config_of,
    costs,
    question_rows,
    run_sweep,
    scores,
)
from kvplug_evals.sweep.settings import Suite, changed, expand, folder, read_suite
from kvplug_evals.sweep.stats import paired, summary


def suite(**options):
    return Suite(**{"name": "mine", "tasks": {"kvplug_recall": {}}, **options})


def test_dense_and_the_same_bytes_stand_beside_every_policy():
    found = expand(suite(), "vllm", ["quest(budget=1024)", "dense"], baselines=True)
    assert [s.policy for s in found] == [
        "dense",
        "quest(budget=1024, dense_layers=2)",
        "random(budget=1024, sinks=4, window=0, seed=0)",
        "streaming_llm(sinks=32, window=992)",
    ]


def test_the_smallest_budget_of_a_share_has_its_baselines_too():
    sweep = suite(tokens=(256,), budgets=(0.25,), policies=("knorm(budget={budget})",))
    assert [s.policy for s in expand(sweep, "vllm", [], baselines=True)][2:] == [
        "random(budget=64, sinks=4, window=0, seed=0)",
        "streaming_llm(sinks=32, window=32)",
    ]


def test_budgets_are_shares_of_the_context_in_whole_pages():
    sweep = suite(
        tokens=(2048, 8192),
        budgets=(0.125, 0.5),
        policies=("streaming_llm(sinks=32, window={window})", "knorm(budget={budget})"),
    )
    lines = [s.policy for s in expand(sweep, "vllm", [], baselines=False) if s.tokens == 2048]
    assert [re.findall(r"(?:window|budget)=(\d+)", line) for line in lines] == [
        [],
        ["224"],
        ["992"],
        ["256", "0"],
        ["1024", "0"],
    ]
    for wrong in ("knorm(budget={bugdet})", "knorm(budget={})", "knorm(budget={budget)"):
        with pytest.raises(ValueError, match=r"may hold \{budget\}, \{window\}"):
            expand(replace(sweep, policies=(wrong,)), "vllm", [], baselines=False)
    with pytest.raises(ValueError, match="needs a budget"):
        expand(suite(policies=("knorm(budget={budget})",)), "vllm", [], baselines=False)


def test_a_setting_has_its_own_directory_and_keeps_it():
    modes = {"modes": ("multi-turn", "multi-request"), "questions": ("aware", "agnostic")}
    names = [s.name for s in expand(suite(**modes), "vllm", ["knorm"], baselines=False)]
    assert len(set(names)) == 8
    assert names == [s.name for s in expand(suite(**modes), "vllm", ["knorm"], baselines=False)]
    # What else is in the sweep changes no directory, another seed every one.
    wider = expand(suite(tokens=(4096, 8192)), "vllm", ["knorm", "quest"], baselines=False)
    assert {s.name for s in expand(suite(), "vllm", ["knorm"], False)} < {s.name for s in wider}
    other = expand(suite(seed=1), "vllm", ["knorm"], baselines=False)
    assert not {s.name for s in other} & {s.name for s in wider}


def test_answers_to_a_file_that_was_changed_are_not_taken_for_answers_to_it(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("as it was\n")
    settings = expand(suite(data=str(data), model=str(tmp_path)), "vllm", [], baselines=False)
    run = Run(out=tmp_path / "out", command="kvplug eval")
    with pytest.raises(ValueError, match="there is no model"):  # begun, and no further
        run_sweep(settings, run, Console(quiet=True))
    directory = run.out / settings[0].name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_of(settings[0], run)))
    (directory / "metrics.json").write_text("{}")
    run_sweep(settings, run, Console(quiet=True))  # finished
    data.write_text("as it is\n")
    with pytest.raises(ValueError, match=r"mine.jsonl is not what it was when .*another --out"):
        run_sweep(settings, run, Console(quiet=True))


@pytest.mark.parametrize("name", [f.stem for f in folder("suites").glob("*.yaml")])
def test_every_suite_that_we_bring_is_whole(name):
    found = read_suite(name)
    assert found.about
    assert expand(found, "vllm", [], baselines=True)
    known = {
        yaml.safe_load(file.read_text().replace("!function ", ""))["task"]
        for file in (folder("tasks") / "scbench").glob("[a-z]*.yaml")
    }
    assert {t for t in found.tasks if t.startswith(("scbench_", "kvplug_"))} <= known


@pytest.mark.parametrize(
    "text, message",
    [
        ("tasks: {a: {}}\nbudget: 1", "there is no key 'budget'; there are about, answers,"),
        ("model: recall", "names its tasks"),
        (
            "tasks: {a: {}}\nmodes: [chat]",
            "modes must be of multi-turn, multi-request, got 'chat'",
        ),
        ("tasks: {a: {}}\nanswers: none", "answers must be of golden, own, got 'none'"),
        ("tasks: {a: {}}\nbudgets: [25]", "share of the context, .* such as 0.25, got 25"),
        ("tasks: {a: {}}\nbudgets: 0.25", "mine.yaml: budgets: .* tuple, got 0.25"),
        ("tasks: {a: {}}\ntokens: 2048", "mine.yaml: tokens: .* tuple, got 2048"),
        ("tasks: {a: {}}\ntokens: [2048, much]", "tokens.1: .* integer.*, got 'much'"),
        ("tasks: {a: {}}\nmodes: multi-turn", "modes: .* tuple, got 'multi-turn'"),
        ("tasks: {a: {}}\nseed: a", "seed: .* integer.*, got 'a'"),
        ("tasks: [a]", "mine.yaml: tasks: .* dict.*, got"),
        ("tasks: {a: [b]}", "mine.yaml: tasks.a: .* dict.*, got"),
        ("tasks: {a: {}", "mine.yaml: not YAML: while parsing a flow mapping"),
        (
            "tasks: {kvplug_recall: {pars: 3}}",
            "kvplug_recall has no option 'pars'; there are data, .*vocabulary, pairs, hops",
        ),
        ("tasks: {a: {}}\ndtype: fp8", "dtype must be of auto, .*bfloat16, .*got 'fp8'"),
    ],
)
def test_a_wrong_suite_is_refused(text, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_suite(str(file))


@pytest.mark.parametrize("option", [{"modes": ("multi-request",)}, {"questions": ("agnostic",)}])
def test_tasks_with_prompts_of_their_own_are_not_reported_as_what_they_were_not(option):
    with pytest.raises(ValueError, match="ruler_vt comes with whole prompts of its own"):
        expand(replace(read_suite("ruler"), **option), "vllm", [], baselines=True)


def test_what_cannot_run_says_what_to_do():
    with pytest.raises(ValueError, match=r"there is no suite 'nothing'; there are .*recall"):
        read_suite("nothing")
    with pytest.raises(ValueError, match="Did you mean 'quest'"):
        expand(suite(), "vllm", ["qest"], baselines=True)
    with pytest.raises(ValueError, match=r"needs a budget; give --budget 0.25"):
        expand(suite(), "vllm", ["quest(budget={budget})"], baselines=True)
    options = EngineOptions(model="m", max_model_len=64, max_num_seqs=1)
    if find_spec("sglang") is None:
        with pytest.raises(EngineError, match=r"needs sglang; install it .*kvplug\[sglang\]"):
            start_engine("sglang", "dense", options)
    with pytest.raises(EngineError, match="must be vllm or sglang, got 'llama"):
        start_engine("llama.cpp", "dense", options)
    assert changed(suite(), seed=3, turns=None) == replace(suite(), seed=3)


def reply(key, **options):
    return Reply(
        **{
            "key": key,
            "text": "k1",
            "tokens": [1],
            "prompt_tokens": 10,
            "cached_tokens": 0,
            "first_token_seconds": 0.1,
            "token_seconds": 0.01,
            "losses": [],
            "agreed": [],
            **options,
        }
    )


WAVE = {
    "seconds": 1.0,
    "peak_blocks": 12,
    "held_blocks": 8,
    "queries": 4.0,
    "cached": 40.0,
    "read": 20.0,
}


def test_a_journal_survives_a_kill_in_the_middle_of_a_line(tmp_path):
    file = tmp_path / "journal.jsonl"
    journal = Journal(file)
    journal.add(reply("t/0"))
    journal.add(reply("t/1", losses=[0.5]))
    journal.add_wave(Wave(replies=list(journal.replies.values()), **WAVE), block_bytes=100)
    with file.open("a") as out:
        out.write('{"reply": {"key": "t/2", "te')
    again = Journal(file)
    assert again.replies == journal.replies
    assert again.wave_of()["t/1"]["block_bytes"] == 100
    again.add(reply("t/2"))
    assert list(Journal(file).replies) == ["t/0", "t/1", "t/2"]


def test_the_seconds_of_a_setting_are_those_of_all_its_starts(tmp_path, monkeypatch):
    clock = iter([0.0, 40.0, 1000.0, 1002.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    file = tmp_path / "journal.jsonl"
    Journal(file).add_wave(Wave(replies=[reply("t/0")], **WAVE), block_bytes=100)
    assert Journal(file).seconds == 42


def test_a_journal_survives_a_kill_while_it_is_read(tmp_path, monkeypatch):
    file = tmp_path / "journal.jsonl"
    Journal(file).add(reply("t/0"))

    def killed(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with contextlib.suppress(KeyboardInterrupt):
        Journal(file)
    monkeypatch.undo()
    assert list(Journal(file).replies) == ["t/0"]


@pytest.mark.parametrize("junk", [b"\0" * 37, b"\xff\xfe", b'{"reply": {"text": "\xe2'])
def test_a_journal_survives_what_a_crash_left_of_its_end(junk, tmp_path):
    file = tmp_path / "journal.jsonl"
    Journal(file).add(reply("t/0"))
    with file.open("ab") as out:
        out.write(junk)
    Journal(file).add(reply("t/1"))
    assert list(Journal(file).replies) == ["t/0", "t/1"]


def test_costs_are_a_requests_share_of_its_wave():
    found = costs({**WAVE, "keys": ["a", "b"], "block_bytes": 100})
    assert found["held_bytes"] == 400
    assert found["freed_blocks"] == 2
    assert (found["cached_per_step"], found["read_per_step"]) == (10, 5)
    assert costs(None) == {}


def test_scores_of_other_tasks_are_found():
    assert scores({"fixed": 0.5, "compat": 1.0}) == {"fixed": 0.5, "compat": 1.0}
    ruler = {"metrics": ["4096", "8192"], "4096": 0.75, "8192": -1}
    assert scores(ruler)["fixed"] == 0.75
    assert scores({"metrics": ["acc"], "acc": 1.0})["fixed"] == 1.0
    both = {"metrics": ["acc", "acc_norm"], "acc": 0.0, "acc_norm": 1.0}
    assert scores(both)["fixed"] == 0.0, "one metric, not the better of two for each question"


def test_a_question_is_one_row_however_many_filters_its_task_has():
    samples = [
        {"doc_id": n, "doc": {}, "target": "1", "filter": name, "metrics": ["em"], "em": em}
        for name, em in (("strict", 0.0), ("flexible", 1.0))
        for n in range(2)
    ]
    found = question_rows("gsm8k", {"gsm8k": samples}, Journal())
    assert [(row["doc"], row["fixed"]) for row in found] == [(0, 0.0), (1, 0.0)]


def rows(values, contexts=6, **options):
    """A row for each context and turn."""
    return [
        {
            "task": "kvplug_recall",
            "doc": context * len(values) + turn,
            "conversation": f"c{context}",
            "turn": turn,
            "fixed": value,
            "compat": value,
            "loss": 2 - value,
            "agreement": value,
            "prompt_tokens": 2048,
            "cached_tokens": 2000 * bool(turn),
            "first_token_seconds": 0.1,
            "token_seconds": 0.01,
            "held_bytes": 4e6,
            "read_per_step": 2000.0,
            **options,
        }
        for context in range(contexts)
        for turn, value in enumerate(values)
    ]


def test_paired_differences_are_on_the_same_questions():
    base = rows([1.0, 1.0, 0.5])
    found = paired(rows([0.5, 1.0, 0.5]), base, "fixed")
    assert found.mean == pytest.approx(-1 / 6)
    assert (found.low, found.high) == pytest.approx((-1 / 6, -1 / 6)), "all contexts agree"
    assert found.is_clear
    assert found.questions == 18
    assert paired(base, base, "fixed").mean == 0
    assert not paired(base, base, "fixed").is_clear
    assert paired(rows([1.0], loss=None), base, "loss") is None
    alone = paired(rows([0.5], 1), rows([1.0], 1), "fixed")
    assert (alone.mean, alone.is_clear) == (-0.5, False), "one context is no sample"
    mixed = [*rows([0.0, 0.0], 3), *rows([1.0, 1.0], 6)[6:]]
    wide = paired(mixed, rows([0.5, 0.5]), "fixed")
    assert wide.low < 0 < wide.high
    assert not wide.is_clear


def finish(
    out: Path, policy: str, some, mode: str = "multi-turn", engine: str = "vllm", **more: object
):
    about = "".join(f"-{name}-{value}" for name, value in more.items())
    directory = out / f"{engine}-{mode}-{re.sub('[^a-z0-9]+', '-', policy)}{about}"
    directory.mkdir(parents=True)
    config = {
        "engine": engine,
        "policy": policy,
        "tokens": 2048,
        "mode": mode,
        "question": "aware",
        "model": "m",
        "suite": {"name": "mine", "seed": 0, "data": "generated", "tasks": {}, **more},
        "command": "kvplug eval --suite mine",
    }
    environment = {
        "cpu": "two cores",
        "threads": 1,
        "engine_processes": "its own",
        engine: "0.32",
        "seconds": 60.0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "environment.json").write_text(json.dumps(environment))
    (directory / "metrics.json").write_text(json.dumps(summary(some)))
    (directory / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))


@pytest.fixture
def out(tmp_path):
    finish(tmp_path / "a", "dense", rows([1.0, 1.0]))
    finish(tmp_path / "a", "snapkv(budget=512)", rows([1.0, 0.5], held_bytes=1e6))
    finish(tmp_path / "a", "random(budget=512)", rows([0.0, 0.5], held_bytes=1e6))
    finish(tmp_path / "a", "quest(budget=4096)", rows([1.0, 1.0]))
    finish(tmp_path / "a", "quest(budget=512, top_p=0.9)", rows([1.0, 1.0], read_per_step=512.0))
    finish(tmp_path / "a", "dense", rows([0.25, 0.5]), mode="multi-request")
    finish(tmp_path / "a", "knorm", rows([0.25, 0.0], held_bytes=1e6), mode="multi-request")
    (tmp_path / "a" / "unfinished").mkdir()
    return tmp_path / "a"


@pytest.fixture
def drawn(monkeypatch):
    """Figures, none of which is saved: that takes most of the time of a plot."""
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure)
    )
    return figures


def test_the_report_ranks_only_what_says_something(out):
    plots = draw(results(out), out)
    text = write_report(out, plots).read_text()
    table = {}
    for line in text.split("\n"):
        if line.startswith("| `"):
            table.setdefault(line.split("|")[1].strip(), line)
    assert "-0.25 [-0.25, -0.25]" in table["`snapkv(budget=512)`"]
    assert "| 25% |" in table["`snapkv(budget=512)`"]
    assert "| -0.50 [-0.50, -0.50] |" in table["`snapkv(budget=512)`"], "beats random"
    assert "**= dense**" in table["`quest(budget=4096)`"]
    assert "**no signal**" in table["`knorm`"]
    assert "[" not in table["`knorm`"].split("|")[3], "nothing is ranked without a signal"
    assert "| ≤ 512 | 26% |" in table["`quest(budget=512, top_p=0.9)`"], "the device decides"
    assert "≤" not in table["`quest(budget=4096)`"]
    assert "0 / 2,000" in text
    assert "7 minutes of answering" in text
    assert "6 contexts, 12 questions, prompts of 2,048 tokens on average" in text
    assert "    kvplug eval --suite mine\n" in text
    assert [plot.name for plot in plots] == ["mine-kvplug_recall-2048.png"]
    assert f"]({plots[0].name})" in text
    assert plots[0].read_bytes().startswith(b"\x89PNG")


def test_directories_folded_into_one_file_say_the_same(out):
    (out / "refused").mkdir()
    (out / "refused" / "config.json").write_text(json.dumps({"policy": "engine(a=1)"}))
    (out / "refused" / "refused.json").write_text(json.dumps({"reason": "no such thing"}))
    (out / "unfinished" / "journal.jsonl").write_text("")
    finish(out, "keydiff", [*rows([0.5], 2), *rows([0.25], 3, loss=None)[2:]], seed=1)
    before, text = results(out), report(out, [])
    assert pack(out) == out / PACKED
    assert sorted(file.name for file in out.iterdir()) == [PACKED, "unfinished"]
    assert results(out) == [replace(one, rows=[told(row) for row in one.rows]) for one in before]
    assert report(out, []) == text
    assert refusals(out) == {"engine(a=1)": "no such thing"}
    assert pack(out).read_text().count("\n") == len(before) + 1, "again, and nothing is lost"
    finish(out, "dense", rows([0.0, 0.0]))
    assert report(out, []) != text, "what was run anew stands for what was packed"
    pack(out)
    assert len(results(out)) == len(before)


def told(row):
    return {name: value for name, value in row.items() if value is not None}


def test_a_packed_setting_is_finished_and_its_data_is_remembered(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("as it was\n")
    (setting,) = expand(suite(data=str(data), model=str(tmp_path)), "vllm", [], baselines=False)
    run = Run(out=tmp_path / "out", command="kvplug eval")
    finish(run.out, "dense", rows([1.0]))
    (made,) = run.out.iterdir()
    (made / "config.json").write_text(json.dumps(config_of(setting, run)))
    made.rename(run.out / setting.name)
    pack(run.out)
    run_sweep([setting], run, Console(quiet=True))
    data.write_text("as it is\n")
    with pytest.raises(ValueError, match=r"mine.jsonl is not what it was when .*another --out"):
        run_sweep([setting], run, Console(quiet=True))


@pytest.fixture
def handlers():
    """A command takes the signals that end it; here they are put back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_reports_are_written_anew_and_directories_packed_and_nothing_is_run(out):
    def kvplug(*arguments):
        done = CliRunner().invoke(app, ["eval", *arguments])
        assert done.exit_code == 0, done.output
        return "".join(done.output.split())

    kvplug("--report", str(out), "--json", str(out.parent / "figures.json"))
    figures = json.loads((out.parent / "figures.json").read_text())
    assert {"dense", "snapkv(budget=512)"} <= {line["policy"] for line in figures}
    assert all(line["tokens"] == 2048 and "fixed" in line["means"] for line in figures)
    text = (out / "report.md").read_text()
    assert text.startswith("# mine")
    (out / "mine-kvplug_recall-2048.png").unlink()
    assert str(out / PACKED) in kvplug("--pack", str(out))
    assert not list(out.glob("*/metrics.json"))
    kvplug("--report", str(out))
    assert (out / "report.md").read_text() == text
    assert (out / "mine-kvplug_recall-2048.png").exists()
    nowhere = CliRunner().invoke(app, ["eval", "--pack", str(out / "unfinished")])
    assert nowhere.exit_code == 1
    assert "holds no finished setting" in " ".join(nowhere.output.split())


def test_wrong_data_is_refused_before_an_engine_starts(tmp_path, monkeypatch):
    start = "kvplug_evals.sweep.session.start_engine"
    monkeypatch.setattr(start, lambda *_: pytest.fail("an engine was started"))
    model, data = tmp_path / "model", tmp_path / "mine.jsonl"
    build_recall_model(model)
    data.write_text('{"context": "c"}\n')
    for options, message in (
        ({"data": str(data)}, r"mine.jsonl, line 1: multi_turns must be"),
        ({"data": "nowhere.jsonl"}, "there is no file nowhere.jsonl; data is generated, hub or"),
        ({"tasks": {"scbench_kvv": {}}}, "there is no task 'scbench_kvv'"),
        ({"tasks": {"scbench_qa_chn": {}}}, "qa_chn has no generator"),
        ({"turns": 6}, "at most 5 turns"),
        ({"model": "nowhere"}, "there is no model in nowhere"),
    ):
        sweep = suite(**{"tasks": {"scbench_kv": {}}, "model": str(model), **options})
        level = logging.getLogger("lm_eval").level
        with pytest.raises((ValueError, OSError), match=message):
            run_sweep(
                expand(sweep, "vllm", [], baselines=False),
                Run(out=tmp_path / "out", command="kvplug eval"),
                Console(quiet=True),
            )
        assert logging.getLogger("lm_eval").level == level, "left as it was"


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_swallows_still_ends_the_sweep(number):
    interrupts = Interrupts()
    interrupts.check()
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert interrupts.came
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()


def test_every_row_saves_or_is_marked(out):
    for _, made in tables(results(out)):
        for line in made:
            assert line.is_dense or line.saves or line.verdict == "= dense"


def test_a_row_that_was_not_counted_is_not_called_dense(tmp_path):
    finish(tmp_path, "dense", rows([1.0]))
    finish(tmp_path, "knorm", rows([0.5], held_bytes=None, read_per_step=None))
    ((_, (_, knorm)),) = tables(results(tmp_path))
    assert (knorm.saves, knorm.verdict) == (None, "not counted")


def test_tables_of_two_seeds_are_told_apart(out, drawn):
    before = write_report(out, []).read_text()
    assert "seed" not in before
    finish(out, "dense", rows([1.0, 0.75]), seed=1)
    finish(out, "knorm", rows([1.0, 0.5], held_bytes=1e6), seed=1)
    heads = [li for li in write_report(out, []).read_text().split("\n") if li.startswith("## ")]
    assert len(set(heads)) == len(heads)
    assert sum(", seed 1" in head for head in heads) == 1
    draw(results(out), out)
    assert sum(", seed 1" in axes.get_ylabel() for axes in drawn[0].axes) == 1
    finish(out / "own", "dense", rows([1.0]), answers="own")
    assert ", answers own\n" in write_report(out / "own", []).read_text()


def test_settings_of_two_engines_are_never_compared_in_one_table(out, drawn):
    finish(out, "dense", rows([0.5, 1.0]), engine="sglang")
    finish(out, "knorm", rows([0.5, 0.5], held_bytes=1e6), engine="sglang")
    made = {(m[0].result.engine, m[0].result.place[2]): m for _, m in tables(results(out))}
    assert set(made) == {
        ("vllm", "multi-turn"), ("vllm", "multi-request"), ("sglang", "multi-turn")
    }  # fmt: skip
    dense, knorm = made["sglang", "multi-turn"]
    assert dense.is_dense
    assert dense.means["fixed"] == 0.75
    assert knorm.accuracy.mean == pytest.approx(-0.25)
    text = write_report(out, draw(results(out), out)).read_text()
    assert text.count(", sglang\n") == 1
    assert sum(", sglang\n" in axes.get_ylabel() for axes in drawn[0].axes) == 1
    assert "vllm 0.32, sglang 0.32" in text


def test_what_selects_from_random_is_not_the_baseline(out):
    finish(out, "random(budget=512) + quest(budget=64)", rows([0.0, 0.0], held_bytes=1e6))
    found = {line.result.policy: line for _, made in tables(results(out)) for line in made}
    assert found["snapkv(budget=512)"].beyond_random.mean == pytest.approx(-0.5)
    assert found["random(budget=512) + quest(budget=64)"].beyond_random.mean == pytest.approx(0.25)


def test_a_plot_names_its_data(tmp_path, drawn):
    finish(tmp_path, "dense", rows([1.0]))
    finish(tmp_path, "knorm", rows([0.5], held_bytes=1e6))
    draw(results(tmp_path), tmp_path)
    assert "kvplug_recall (our own task)" in drawn[0].get_suptitle()


def test_a_label_is_that_of_the_data_whatever_was_stored_with_the_answers(tmp_path):
    words = {"tasks": {"scbench_kv": {"vocabulary": "words"}}}
    for policy in ("dense", "knorm"):
        finish(tmp_path, policy, rows([1.0], task="scbench_kv", source="exact recipe"), **words)
    text = report(tmp_path, [])
    assert "Data: exact recipe but for words instead of UUIDs." in text
    assert "Data: exact recipe." not in text
    ((_, (dense, _)),) = tables(results(tmp_path))
    assert dense.source == "exact recipe but for words instead of UUIDs"
    other = {"data": "mine.jsonl", "tasks": {"scbench_kv": {"data": "hub"}}}
    finish(tmp_path / "b", "dense", rows([1.0], task="scbench_kv"), **other)
    (result,) = results(tmp_path / "b")
    assert result.source("scbench_kv").startswith("microsoft/SCBench, scbench_kv")
    assert result.source("ruler_vt") == "lm-eval"


def test_a_plot_shows_what_holds_more_than_dense(tmp_path, drawn):
    finish(tmp_path, "dense", rows([1.0]))
    finish(tmp_path, "snapkv(budget=512)", rows([0.5], held_bytes=7.2e6))
    draw(results(tmp_path), tmp_path)
    axes = drawn[0].axes
    assert axes[0].get_xlim()[1] > 100 * 7.2 / 4
    assert axes[1].get_xlim()[1] == 110


def test_families_of_compositions():
    assert family("snapkv(budget=1, window=2) + quest(budget=3)") == "snapkv + quest"
    assert family("quest(budget=3, dense_layers=0)") == "quest"
    assert family("quest(budget=3, top_p=0.9, dense_layers=0)") == "quest top_p"


@pytest.mark.usefixtures("handlers")
def test_two_directories_are_compared_where_they_meet(out, tmp_path):
    finish(tmp_path / "b", "snapkv(budget=512)", rows([1.0, 1.0], held_bytes=1e6))
    finish(tmp_path / "b", "keydiff", rows([1.0, 1.0]))

    def shown():
        with (tmp_path / "shown").open("w") as file:
            console = Console(width=160, record=True, file=file)
            console.print(as_table(out, tmp_path / "b", compare(out, tmp_path / "b")))
        return console.export_text()

    text = shown()
    assert "(our own task)" in " ".join(text.split()), "stand-ins are named in every output"
    assert "0.750" in text
    assert "+0.250 [+0.250, +0.250] *" in text
    assert "keydiff" not in text
    finish(out, "snapkv(budget=512)", rows([0.0, 0.0]), seed=1)
    assert shown() == text, "of two seeds the same one"
    done = CliRunner().invoke(
        app, ["eval", "--compare", str(out), str(tmp_path / "b"), "--json", "-"]
    )
    (row,) = json.loads(done.stdout)
    assert (row["policy"], row["after"] - row["before"]) == ("snapkv(budget=512)", 0.25)
    assert row["difference"]["low"] == 0.25
    (tmp_path / "c").mkdir()
    finish(tmp_path / "c", "expected", rows([1.0]))
    with pytest.raises(ValueError, match="no setting in common"):
        compare(out, tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="holds no finished setting"):
        results(tmp_path / "d")
