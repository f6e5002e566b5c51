"""``kvplug bench decode``: what is fitted, what is judged, and what would measure nothing."""

import io
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

rich = pytest.importorskip("rich.console")
pytest.importorskip("scipy")

from kvplug.advice.model import model_of, read_model  # noqa: E402
from kvplug.advice.pace import Choosing, Pace, StepBytes, read_pace, shape_of  # noqa: E402
from kvplug_evals.bench.decode import (  # noqa: E402
    DENSE,
    ITEMSIZE,
    LINES,
    Cell,
    Load,
    Options,
    Run,
    fit,
    reads,
    run,
    save,
    show,
)
from kvplug_evals.bench.options import Clock  # noqa: E402
from kvplug_evals.bench.steps import Timed  # noqa: E402
from kvplug_evals.models.random_llama import build_random_llama  # noqa: E402

RESULTS = Path(__file__).parents[2] / "results/bench"
ONE_LAYER = {
    "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "vocab_size": 64,
    "intermediate_size": 64,
}  # fmt: skip
TRUE = {
    "fixed": 0.05, "each": 0.002, "whole": 2e-9,
    "methods": {
        "quest": Choosing(layer=3e-4, chosen=3e-9, scanned=9e-9),
        "twilight": Choosing(layer=6e-4, chosen=2e-8, scanned=7e-9),
    },
}  # fmt: skip


def options(folder, **changes):
    given = {
        "policies": LINES, "model": folder / "llama", "fit": [1024, 3072, 6144],
        "judge": [2048, 8000], "batch": 4, "dtype": "float32", "block_size": 32, "repeats": 1,
        "threads": 1, "clock": Clock.CPU, "out": folder / "decode.json",
        "command": "kvplug bench decode",
    }  # fmt: skip
    return Options(**(given | changes))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setattr("kvplug_evals.bench.decode.provenance", lambda *_: dict(PROVENANCE))
    build_random_llama(tmp_path / "llama", layers=4)
    return options(tmp_path)


def machine(asked):
    """A run on a machine that keeps the formula to the letter."""
    true = Pace(
        source="", model=shape_of(read_model(asked.model)), itemsize=4, block_size=32,
        arithmetic=1e10, **TRUE,
    )  # fmt: skip
    done = Run(options=asked, prompt=(3e10, 3.0))
    for line in (DENSE, *asked.policies):
        for load in [*asked.fitted, *asked.judged]:
            read, name = reads(asked, line, load).decode(), line.partition("(")[0]
            seconds = true.step(None if line == DENSE else name, load.at_once, read)
            done.cells.append(Cell(policy=line, load=load, measured=seconds, read=read))
    return done


def test_the_rates_of_a_machine_are_found_again(asked):
    done = machine(asked)
    assert done.pace.fixed == pytest.approx(TRUE["fixed"])
    assert done.pace.each == pytest.approx(TRUE["each"])
    assert done.pace.whole == pytest.approx(TRUE["whole"])
    assert done.pace.arithmetic == 1e10
    for name, method in TRUE["methods"].items():
        found = done.pace.methods[name]
        assert vars(found) == pytest.approx(vars(method)), name
    assert done.worst == pytest.approx(0, abs=1e-6)


def test_judged_cells_are_not_fitted(asked):
    done = machine(asked)
    at = next(n for n, cell in enumerate(done.cells) if cell.load == Load(8000))
    cell = done.cells[at]
    done.cells[at] = Cell(
        policy=cell.policy, load=cell.load, measured=2 * cell.measured, read=cell.read
    )
    assert done.pace.whole == pytest.approx(TRUE["whole"])
    assert done.worst == pytest.approx(0.5)


def test_what_is_saved_is_what_plan_reads(asked):
    done = machine(asked)
    save(done)
    assert read_pace(asked.out) == done.pace
    written = json.loads(asked.out.read_text())
    assert {cell["fitted"] for cell in written["cells"]} == {True, False}
    screen = io.StringIO()
    show(done, rich.Console(file=screen, width=100))
    assert "Judged cells are off by at most 0%" in screen.getvalue()
    assert screen.getvalue().split() == asked.out.with_suffix(".txt").read_text().split()


def test_steps_that_do_not_grow_are_refused(asked):
    done = machine(asked)
    done.cells = [
        Cell(policy=x.policy, load=x.load, measured=0.05, read=x.read) for x in done.cells
    ]
    with pytest.raises(ValueError, match="did not grow"):
        _ = done.pace


@pytest.mark.parametrize("left_out", [8192, 32768, 131072])
@pytest.mark.parametrize("heads", ["smollm2", "llama-8b"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_length_of_a_published_run_follows_from_the_others(heads, dtype, left_out):
    """``kvplug bench attention``'s layers, on a machine that did nothing else: by their bytes and
    one fixed part, and what choosing costs, dense and quest are as fast as they were measured."""
    report = json.loads((RESULTS / "attention-cpu-amx-1-thread.json").read_text())
    cells = []
    for cell in report["cells"]:
        if (cell["heads"]["name"], cell["dtype"]) == (heads, dtype):
            load = Load(cell["context"], cell["batch"])
            token = 2 * cell["heads"]["kv"] * cell["heads"]["dim"] * ITEMSIZE[dtype]
            dense = StepBytes(whole=load.tokens * token)
            pages = load.tokens // cell["block_size"]
            quest = StepBytes(chosen=2048 * token, scanned=pages * token, choosing=1)
            for line, read in ((DENSE, dense), ("quest(budget=2048)", quest)):
                of = "stock_ms" if line == DENSE else "quest_ms"
                seconds = cell[of]["median"] / 1e3
                cells.append(Cell(policy=line, load=load, measured=seconds, read=read))
    pace = fit(
        [cell for cell in cells if cell.load.tokens != left_out],
        model=model_of(ONE_LAYER), block_size=32, arithmetic=1.0, source="",
    )  # fmt: skip
    judged = [cell for cell in cells if cell.load.tokens == left_out]
    assert len(judged) == 4
    for cell in judged:
        planned = pace.step(
            None if cell.policy == DENSE else "quest", cell.load.at_once, cell.read
        )
        assert planned == pytest.approx(cell.measured, rel=0.16), (cell.policy, cell.load)


def test_published_engines_take_the_time_that_was_planned():
    """Within a quarter at three lengths that were not fitted, for each of the lines."""
    report = json.loads((RESULTS / "decode-cpu.json").read_text())
    pace = read_pace(RESULTS / "decode-cpu.json")
    judged = [cell for cell in report["cells"] if not cell["fitted"]]
    assert {cell["load"]["tokens"] for cell in judged} == {2048, 4096, 7936}
    assert {cell["policy"] for cell in judged} == {DENSE, *LINES}
    for cell in judged:
        method = None if cell["policy"] == DENSE else cell["policy"].partition("(")[0]
        planned = pace.step(method, cell["load"]["at_once"], StepBytes(**cell["read"]))
        assert planned == pytest.approx(cell["measured"], rel=0.25), cell


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"fit": [1024]}, "--fit needs two lengths"),
        ({"judge": [3072]}, "3,072 tokens are to be fitted and judged"),
        ({"threads": 2}, "add --threads 1"),
        ({"policies": ["snapkv(budget=64)"]}, "no selector alone"),
        ({"policies": ["kivi(bits=4)"]}, "no selector alone"),
        ({"policies": ["quest(budget=2048)"]}, "in no layer of .* at 1,024 tokens; raise --fit"),
    ],
)
def test_options_that_would_measure_nothing_are_refused(asked, changes, told):
    with pytest.raises(ValueError, match=told):
        options(asked.model.parent, **changes)


def test_an_engine_is_asked_once_a_load_and_its_lines_share_it(asked, monkeypatch):
    started, chosen = [], []

    class Answering:
        def ask(self, *prompts, policy=None):
            chosen.append((len(prompts), len(prompts[0]), policy))
            seconds = 50 + 0.01 * len(prompts) * len(prompts[0]) * (0.5 if policy else 1)
            return Timed(first_token=3000.0, behind=[seconds] * 12, packed=0)

    @contextmanager
    def engine(line, how):
        started.append((line, how.allow))
        yield Answering()

    monkeypatch.setattr("kvplug_evals.bench.decode.engine", engine)
    done = run(asked, rich.Console(file=io.StringIO()), lambda run: None)
    assert started == [
        ("dense", ()), (LINES[0], ("quest",)), (LINES[2], ("twilight",))
    ]  # fmt: skip
    assert len(done.cells) == 5 * len(dict.fromkeys([*asked.fitted, *asked.judged]))
    assert {policy for _, _, policy in chosen} == {None, *LINES}
    dense = {cell.load: cell.measured for cell in done.cells if cell.policy == DENSE}
    assert dense[Load(8000)] == pytest.approx(0.13)
    quest = {cell.load: cell.measured for cell in done.cells if cell.policy == LINES[0]}
    assert quest[Load(8000)] == pytest.approx(0.09)


PROVENANCE = {
    "command": "kvplug bench decode", "date": "now", "commit": "0", "vllm": "0", "torch": "0",
    "cpu": "none", "cores": 1, "load_at_start": 0.0, "load_at_end": 0.0,
}  # fmt: skip
