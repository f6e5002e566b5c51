"""``kvplug bench serve``: what it sends, what it makes of the answers, and one small real run."""

from __future__ import annotations

import json
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

rich = pytest.importorskip("rich.console")
pytest.importorskip("matplotlib")
pytest.importorskip("httpx")

from kvplug_evals.bench import serve, serve_report  # noqa: E402
from kvplug_evals.bench.load import GENERATORS, Sent  # noqa: E402
from kvplug_evals.bench.prompts import PAIRS, prompts  # noqa: E402
from kvplug_evals.bench.serve import BATCH, MEMORY, TURNS, Cell, Options, agreement  # noqa: E402
from kvplug_evals.bench.turns import WORDS, Conversations  # noqa: E402
from kvplug_evals.models.recall import recall_prompt, word  # noqa: E402
from kvplug_evals.served.choose import ENGINES, configure  # noqa: E402
from kvplug_evals.served.vllm import VLLM  # noqa: E402

RECALL = Path(__file__).parents[2] / ".models" / "recall"
SMALL = {"tokens": 512, "output": 6, "batch": 2, "requests": 6, "fit": 3, "repeats": 1}


def options(out: Path, *policies: str, **changed: object) -> Options:
    given = {**SMALL, **changed}
    return Options(policies=["dense", *policies], out=out, command="kvplug bench serve", **given)


@pytest.mark.parametrize(
    "reply, wanted, share",
    [
        ("a b c d", "a b c d", 1),
        ("a b x d", "a b c d", 0.5),
        ("a b", "a b c d", 0.5),
        ("a b c d e", "a b c d", 0.8),
        ("", "a", 0),
        ("", "", 0),
    ],
)
def test_an_answer_is_as_denses_up_to_the_first_other_word(reply, wanted, share):
    assert agreement(reply, wanted) == share


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"requests": 3}, "--requests 3 all fit where 3 do: ask for more"),
        ({"batch": 4}, r"--batch 4 is more than fit \(--fit 3\)"),
        ({"turns": 1}, "--turns 1 has no later turn: ask for two"),
    ],
)
def test_loads_that_show_nothing_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path / "serve.json", **changed)


def test_clients_ask_each_turn_something_else_that_the_context_holds():
    context = " ".join(f"w{n}" for n in range(3001))
    load = Conversations(context=context, clients=3, turns=40, output=8)
    asked = [load.question(client, turn) for client in range(3) for turn in range(40)]
    assert len(set(asked)) == 120
    assert all(question in context and len(question.split()) == WORDS for question in asked)


def test_every_engine_has_a_generator():
    assert GENERATORS.keys() == ENGINES.keys()


@pytest.mark.engine
@pytest.mark.cpu
def test_prompts_are_of_one_length_and_begin_differently():
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    for model in ("recall", "smollm2"):
        tokenizer = AutoTokenizer.from_pretrained(RECALL.parent / model)
        made = list(islice(prompts(RECALL.parent / model, 512), 20))
        assert all(abs(len(tokenizer(text)["input_ids"]) - 512) <= 8 for text in made)
        assert len({text[:64] for text in made}) == 20
        assert made[:3] == list(islice(prompts(RECALL.parent / model, 512), 3))


def sent(speed: float, *replies: str) -> Sent:
    return Sent(
        output_tokens_per_second=speed, ttft_ms=1, tpot_ms=10 / speed, itl_ms=1, replies=[*replies]
    )


def test_losing_cells_are_kept_and_say_so(tmp_path, monkeypatch):
    asked = options(tmp_path / "serve.json", "quest", repeats=2)
    monkeypatch.setattr(serve, "provenance", lambda command, engine: PROVENANCE)
    run = serve.Run(options=asked, engine=VLLM(model=RECALL))
    run.cells = [
        Cell(policy=policy, load=load, sent=[sent(each, "a b", "c d") for each in speeds],
             preempted=[0, 3], peak=[7, 1200], read=read)
        for policy, load, speeds, read in [
            ("dense", BATCH, (2, 4), 1), ("dense", MEMORY, (2, 4), 1),
            ("quest", BATCH, (4, 5), 0.2), ("quest", MEMORY, (1, 2), 0.2),
        ]
    ]  # fmt: skip
    run.cells[2].sent[1].replies[1] = "c x"
    serve_report.save(run)
    text = (tmp_path / "serve.txt").read_text()
    assert "1 of 2 cells give fewer tokens a second than dense" in text
    batch, memory = (line.split() for line in text.splitlines() if line.startswith(" quest"))
    assert " ".join(batch) == "quest 4.5 22% 1.50 1 2.2 3 1,200 20% 88%"
    assert " ".join(memory[:4]) == "quest 1.5 67% 0.50"
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "serve.json").read_text())
    assert [len(cell["sent"]) for cell in found["cells"]] == [2] * 4
    assert found["settings"]["engine"] == "vllm"


@pytest.mark.parametrize(
    "held, peak, text", [([0, 7, 1200, 3], 1200, "1,200"), ([0, 0], None, "unseen")]
)
def test_a_peak_is_the_most_that_a_look_saw(monkeypatch, held, peak, text):
    looks, seen, all_seen = iter(held), [], threading.Event()

    def state(engine, url):
        found = next(looks, 0)
        if len(seen) == len(held):
            all_seen.set()
        seen.append(found)
        return SimpleNamespace(held=found)

    monkeypatch.setattr(serve, "state", state)
    monkeypatch.setattr(serve, "SAMPLE_SECONDS", 0.001)
    peaks = []
    with serve.watching(VLLM(model=RECALL), "http://a-server", peaks):
        assert all_seen.wait(30)
    assert peaks == [peak]
    assert serve.shown(peaks) == text


PROVENANCE = {
    "command": "kvplug bench serve", "date": "", "commit": "", "vllm": "0", "torch": "0",
    "cpu": "", "cores": 2, "load_at_start": 0.0, "load_at_end": 0.0,
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(900)
def test_dense_and_a_policy_that_evicts_in_servers_of_their_own(tmp_path):
    engine = configure("vllm", RECALL, {"dtype": "float32", "threads": 1})
    asked = options(tmp_path / "serve.json", "snapkv(budget=128)", turns=5)
    run = serve.run(asked, engine, rich.Console(quiet=True), serve_report.save)
    made = recall_prompt(SMALL["tokens"] - 1, PAIRS, 1, seed=0)
    answer, chain = made.questions[0], []
    for _ in range(SMALL["output"]):
        answer = made.successor[answer]
        chain.append(word(answer))
    dense, turns = run.dense(BATCH), run.dense(TURNS)
    ours, crowded, kept = (run.of(load)[1] for load in (BATCH, MEMORY, TURNS))
    assert dense.replies[0].split() == chain
    assert dense.read == 1
    assert ours.read < 0.5
    assert sum(run.dense(MEMORY).preempted) >= sum(crowded.preempted) == 0
    assert min(turns.cached[0], kept.cached[0]) > 0.8
    assert [len(cell.replies) for cell in run.cells] == [2, 6, 10] * 2
    assert len(json.loads(asked.out.read_text())["cells"]) == 6
