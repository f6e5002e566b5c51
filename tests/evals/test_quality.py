"""``kvplug calibrate --quality``: the walk and its test, without an engine and in one."""

import json
from pydoc_data.topics import topics

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("scipy")

from scipy.stats import t as student
from typer.testing import CliRunner

from kvplug import parse
from kvplug_evals.calibration.quality import (
    Setting,
    find,
    read_text,
    shared,
    unmet,
    upper,
)
from kvplug_evals.cli import app
from kvplug_evals.engines.interface import Reply, Wave
from kvplug_evals.models.folder import write_json, write_word_tokenizer
from tests.pace import Pace

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval and vLLM
LINE = "snapkv(budget={budget}, window=32)"
SMALL = {"contexts": 6, "context": 256, "answer": 5, "at_once": 4}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_word_tokenizer(folder, [f"w{token}" for token in range(64)])
    config = {
        "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "dtype": "float32"
    }  # fmt: skip
    write_json(folder / "config.json", config)
    return str(folder)


@pytest.fixture(scope="module")
def told(words):
    """A text of 2,000 words of that model's."""
    return " ".join(f"w{n % 61}" for n in range(2000))


class Losing:
    """In an engine's place: dense loses 2 nats a token, a line what it is said to, and context n a
    hundredth of n more."""

    block_bytes, blocks = 1, 1

    def __init__(self, policy, options, losses):
        self.policy, self.options, self.losses = policy, options, losses
        self.waves, self.closed = [], False

    def run(self, requests, finished=lambda reply: None):
        assert len(requests) <= self.options.max_num_seqs
        self.waves.append(requests)
        replies = []
        for request in requests:
            line = request.policy or self.policy
            wave = 0.01 * int(request.key) if line != "dense" else 0.0
            replies.append(
                Reply(
                    key=request.key, text="", tokens=[], prompt_tokens=len(request.prompt),
                    cached_tokens=0, first_token_seconds=0.0, token_seconds=0.0,
                    losses=[2 + self.losses.get(line, 0.0) + wave] * request.scored, agreed=[],
                )
            )  # fmt: skip
            finished(replies[-1])
        return Wave(
            replies=replies, seconds=0.0, peak_blocks=1, held_blocks=1, queries=4.0, cached=8.0,
            read=2.0,
        )  # fmt: skip

    def close(self):
        self.closed = True


@pytest.fixture
def walk(words, told):
    """-> what was found, and the engines that were started"""

    def go(losses, held_out=False, **options):
        setting = Setting(**{"line": LINE, "quality": 0.1, **SMALL, **options})
        engines = []

        def start(name, policy, given):
            full = {str(parse(line)): loss for line, loss in losses.items()}
            engines.append(Losing(policy, given, full))
            return engines[-1]

        text = read_text(told, "told", words, setting)
        apart = read_text(told[::-1].replace(" ", " w1 "), "apart", words, setting)
        found = find(
            "vllm", words, setting, text, apart if held_out else None, start=start
        )  # fmt: skip
        assert all(engine.closed for engine in engines)
        return found, engines

    return go


def test_a_bound_is_student_s():
    losses = [0.01, 0.02, 0.06, 0.03, -0.01]
    spread = (sum((x - 0.022) ** 2 for x in losses) / 4 / 5) ** 0.5
    assert upper(losses) == pytest.approx(0.022 + student.ppf(0.95, 4) * spread)
    assert upper([0.5] * 5) == 0.5


def test_a_bound_holds_as_often_as_it_says():
    import numpy as np

    drawn = np.random.default_rng(0).normal(0.05, 0.1, (2000, 8))
    share = sum(upper(list(row)) >= 0.05 for row in drawn) / len(drawn)
    assert share == pytest.approx(0.95, abs=0.015)


def test_the_walk_goes_down_and_ends_with_the_first_that_is_not_good_enough(walk):
    losses = {f"snapkv(budget={b}, window=32)": x for b, x in ((128, 0), (64, 0.2))}
    found, engines = walk(losses, shares=(0.25, 0.5, 0.125, 0.26))
    assert [parse(m.policy).scored.budget for m in found.measured] == [128, 64]
    assert found.chosen is found.measured[0]
    assert found.chosen.loss == pytest.approx(0.025), "the mean of 0 to 0.05"
    assert found.chosen.bound == pytest.approx(upper([0.01 * n for n in range(6)]))
    assert found.chosen.read == 0.25
    assert found.dense == 2
    (engine,) = engines
    assert (engine.policy, engine.options.allow) == ("dense", ("snapkv",))
    assert engine.options.max_budget == 128
    first = engine.waves[0][0]
    assert (len(first.prompt), len(first.forced), first.scored) == (256, 5, 4)
    assert [len(wave) for wave in engine.waves] == [4, 2] * 3
    starts = [request.prompt[0] for wave in engine.waves[:2] for request in wave]
    assert len(set(starts)) == 6, "contexts are spread over the text"


def test_a_mean_below_the_bound_is_not_enough(walk):
    found, _ = walk({"snapkv(budget=128, window=32)": 0.07}, shares=(0.5,))
    assert found.measured[0].loss < 0.1 < found.measured[0].bound
    assert found.chosen is None
    assert "more --contexts" in unmet(found)


def test_a_bound_that_no_budget_meets_says_what_to_do(walk):
    found, _ = walk({"snapkv(budget=128, window=32)": 1.0}, shares=(0.5, 0.25), held_out=True)
    assert len(found.measured) == 1
    assert (found.chosen, found.held_out) == (None, None)
    assert "loses 1.025" in unmet(found)
    assert "give a larger --budget, or another --policy" in unmet(found)


def test_what_requests_cannot_choose_has_engines_of_its_own(walk):
    line = "streaming_llm(sinks=32, window={window})"
    found, engines = walk({}, line=line, shares=(0.5, 0.25), held_out=True)
    kept = ["streaming_llm(sinks=32, window=96)", "streaming_llm(sinks=32, window=32)"]
    assert [engine.policy for engine in engines] == ["dense", *kept]
    assert all(request.policy is None for e in engines for w in e.waves for request in w)
    assert all(engine.options.allow == () for engine in engines)
    text, dense, there = found.held_out
    assert (text.name, dense, there.policy) == ("apart", 2, kept[1])
    assert [len(engine.waves) for engine in engines] == [4, 2, 4]


@pytest.mark.parametrize(
    "lines, names",
    [
        (["quest(budget=64)", "quest(budget=128)"], ("quest",)),
        (["snapkv(budget=64) + quest(budget=32)"], ("quest", "snapkv")),
        (["pyramid(snapkv(budget=64))"], None),
        (["kivi(bits=4) + twilight(budget=0.5, bits=4)"], None),
        (["kvzip(budget=0.25, chunk=512)"], None),
    ],
)
def test_engines_are_shared_where_requests_may_choose(lines, names):
    found = shared(lines)
    assert (found and found["allow"]) == names


@pytest.mark.parametrize(
    "given, message",
    [
        ({"line": "snapkv(budget=64)"}, r"leaves no budget to be found; write \{budget\}"),
        ({"line": "dense"}, r"leaves no budget to be found"),
        ({"line": "snapkv(budget={budgets})"}, r"may hold \{budget\}"),
        ({"line": "snapkw(budget={budget})"}, "snapkv"),
        ({"quality": 0.0}, r"above 0, got 0.0; write 0.05"),
        ({"contexts": 2}, r"--contexts must be at least 5"),
        ({"answer": 1}, r"--answer must be at least 2, got 1"),
        ({"at_once": 0}, r"--at-once must be at least 1"),
        ({"shares": (0.5, 2.0)}, r"a share of the context, above 0 and at most 1, got 2.0"),
        ({"dtype": "int8"}, r"--dtype must be of"),
    ],
)
def test_what_measures_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Setting(**{"line": LINE, "quality": 0.1, **given})


def said(*words):
    done = CliRunner().invoke(app, ["calibrate", *map(str, words)])
    return done, str(done.exception) if done.exception else ""


def test_the_command_refuses_before_an_engine_starts(words, told, tmp_path):
    (short := tmp_path / "short.txt").write_text(told[:200])
    line = ["--quality=0.1", f"--policy={LINE}", f"--text={short}", f"--out={tmp_path / 'q'}"]
    assert "tokens of this model, and 16 contexts of 2,112 need 33,792" in said(words, *line)[1]
    assert "--density is of heads, without --quality" in said(words, *line, "--density=0.5")[1]
    assert "--held-out is of budgets, with --quality" in said(words, f"--held-out={short}")[1]
    assert "write --policy 'snapkv(budget={budget})'" in said(words, "--quality=0.1")[1]
    gone = said(words, *line[:3], f"--out={tmp_path / 'no' / 'q'}")[0]
    assert isinstance(gone.exception, FileNotFoundError)


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_what_an_engine_finds_is_written_down_and_holds_elsewhere(smollm2, tmp_path):
    """Both texts are documentation; the model is SmolLM2's first layers."""
    Pace.starts += 1
    whole = "\n".join(topics[name] for name in sorted(topics))
    here, there, out = (tmp_path / name for name in ("here.txt", "there.txt", "quality.json"))
    here.write_text(whole[:16_000])
    there.write_text(whole[60_000:76_000])
    done, error = said(
        smollm2, "--quality=0.3", "--policy=knorm(budget={budget})", "--contexts=6",
        "--context=256", "--answer=12", "--budget=1", "--budget=0.5", "--budget=0.125",
        "--dtype=float32", f"--text={here}", f"--held-out={there}", f"--out={out}",
    )  # fmt: skip
    assert not error, done.output
    found = json.loads(out.read_text())
    full, *less = found["measured"]
    assert full["loss"] == pytest.approx(0, abs=1e-5), "a whole budget is dense"
    assert full["read"] == 1
    assert any(abs(each["loss"]) > 1e-3 for each in less), "the others are not"
    meeting = [each["policy"] for each in found["measured"] if each["bound"] < 0.3]
    assert found["policy"] == meeting[-1]
    assert found["policy"] in done.output.replace("\n", " ")
    assert found["held_out"]["policy"] == found["policy"]
    assert found["held_out"]["loss"] < 0.3
    assert found["held_out"]["text"]["name"] == "there.txt"
    assert {"vllm", "kvplug", "torch"} <= set(found["versions"])
    assert found["text"]["sha256"] != found["held_out"]["text"]["sha256"]
