"""Steps as they were measured: the formula, what ``plan --pace`` makes of it, what is refused."""

import json
from dataclasses import replace

import pytest

from kvplug import parse, read_offer
from kvplug.advice.bounds import Reads, Setup, bounds, read_traffic
from kvplug.advice.card import Card
from kvplug.advice.model import model_of
from kvplug.advice.pace import Choosing, Pace, StepBytes, read_pace, reader, shape_of
from kvplug.advice.ranking import advise

CONFIG = {
    "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "vocab_size": 49152,
    "num_key_value_heads": 3, "intermediate_size": 1536, "dtype": "float32",
    "tie_word_embeddings": True,
}  # fmt: skip
MODEL = model_of(CONFIG)
GiB = 1 << 30
PACE = Pace(
    source="pace.json", model=shape_of(MODEL), itemsize=4, block_size=32, fixed=0.05, each=0.001,
    whole=1e-10, arithmetic=5e10,
    methods={"quest": Choosing(layer=2e-4, chosen=2e-10, scanned=5e-10)},
)  # fmt: skip
CARD = Card(name="", memory=0, bandwidth=1e10, arithmetic=5e10)


def planned(line, traffic, pace=PACE):
    setup = Setup(card=CARD, pool=64 * GiB, pace=pace)
    return bounds(MODEL, setup, read_traffic(traffic), read_offer({"policy": line}, environ={}))


def written(tmp_path, **changes):
    """As ``kvplug bench decode`` saves it."""
    pace = {
        "model": PACE.model, "itemsize": 4, "block_size": 32, "fixed": 0.05, "each": 0.001,
        "whole": 1e-10, "arithmetic": 5e10,
        "methods": {"quest": {"layer": 2e-4, "chosen": 2e-10, "scanned": 5e-10}}, **changes,
    }  # fmt: skip
    file = tmp_path / "pace.json"
    file.write_text(json.dumps({"pace": pace}))
    return file


def test_a_dense_step_is_its_fixed_part_and_the_bytes_of_each_request():
    step = planned("dense", "8000/2@4").step
    assert step == pytest.approx(0.05 + 4 * (0.001 + 8001 * MODEL.cache_token() * 1e-10))


def test_choosing_costs_each_layer_once_and_each_request_its_bytes():
    line = "quest(budget=2048, dense_layers=2)"
    token = MODEL.cache_token() / 30
    one, four = (planned(line, f"8192/2@{n}").step for n in (1, 4))
    pages = -(-8193 // 32)
    whole, chosen, scanned = 2 * token * 8193, 28 * token * 2048, 28 * token * pages
    read = Reads(
        MODEL, Setup(card=CARD, pool=GiB), read_traffic("8192/2@1"),
        read_offer({"policy": line}, environ={}), 4,
    ).decode()  # fmt: skip
    assert read.choosing == 28
    assert read.whole == whole
    # The newest page is not full.
    assert read.chosen == pytest.approx(chosen, rel=0.02)
    assert read.scanned == pytest.approx(scanned, rel=0.02)
    own = 0.001 + read.whole * 1e-10 + read.chosen * 2e-10 + read.scanned * 5e-10
    assert one == pytest.approx(0.05 + 28 * 2e-4 + own)
    assert four == pytest.approx(0.05 + 28 * 2e-4 + 4 * own)


def test_a_context_within_the_budget_is_read_as_dense_reads_it():
    assert planned("quest(budget=2048)", "900/2@1").step == planned("dense", "900/2@1").step


def test_what_evicts_decodes_at_dense_s_pace_and_formats_have_their_own():
    assert reader(parse("snapkv(budget=512)")) is None
    assert reader(parse("xattention + quest(budget=64)")) == "quest"
    assert reader(parse("kivi(bits=4) + twilight(budget=0.125, bits=4)")) == "kivi + twilight"
    assert planned("snapkv(budget=512)", "8000/2@1").step < planned("dense", "8000/2@1").step
    for line in ("twilight(budget=0.125)", "kivi(bits=4)"):
        with pytest.raises(ValueError, match="kvplug bench decode --policy"):
            planned(line, "8000/2@1")


def test_bytes_of_steps_add_up():
    both = StepBytes(whole=1, chosen=2) + StepBytes(chosen=3, scanned=4, choosing=5)
    assert both == StepBytes(whole=1, chosen=5, scanned=4, choosing=5)
    assert both.bytes == 10


def test_advice_counts_what_choosing_costs():
    """By its bytes quest gains at 4K; where choosing is dear it loses, and is not advised."""
    traffic, line = read_traffic("4000/500@1"), "quest(budget=0.125)"

    def gain(pace):
        found = advise(MODEL, Setup(card=CARD, pool=64 * GiB, pace=pace), traffic, "any", [line])
        quest = next(each for each in found.lines if each.policy == line)
        return quest.gain, found

    bound, _ = gain(None)
    dear, found = gain(
        replace(PACE, fixed=0, methods={"quest": Choosing(layer=1e-2, chosen=0, scanned=0)})
    )
    assert bound > 1.1
    assert dear < 1
    assert found.best is None or "quest" not in found.best.policy
    assert (
        "its steps are not in pace.json" in dict(found.left_out)["engine(kv_cache_dtype=fp8_e4m3)"]
    )


def test_the_command_plans_by_a_file(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from kvplug.cli import app

    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "dtype": "bfloat16"}))
    file = written(tmp_path)
    asked = ["plan", str(tmp_path), "--traffic", "8000/64@1", "--pace", str(file)]
    asked += ["--cache", "4GiB", "--quality", "any", "--policy", "quest(budget=0.3)"]
    shown = testing.CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "steps as measured ones took" in " ".join(shown.output.split())
    found = json.loads(testing.CliRunner().invoke(app, [*asked, "--json", "-"]).output)
    assert found["pace"]["fixed"] == 0.05
    dense = next(line for line in found["lines"] if line["policy"] == "dense")
    seen = 8000 + 32
    assert dense["step_seconds"] == pytest.approx(0.051 + seen * MODEL.cache_token() * 1e-10)
    left = {each["policy"] for each in found["left_out"]}
    assert "twilight(budget=0.0625)" in left
    assert "snapkv(budget=2112)" not in left


@pytest.mark.parametrize(
    "changes, options, told",
    [
        ({"model": {**PACE.model, "layers": 12}}, [], "another model: 12 layers"),
        ({"block_size": 64}, [], "write --block-size 64"),
        ({"whole": "fast", "fixd": 1}, [], "is none"),
        ({}, ["--gpu", "h100"], "leave one of them out"),
        ({}, ["--cache"], "write --cache 4GiB"),
    ],
)
def test_a_file_that_does_not_fit_is_told_what_to_write(tmp_path, changes, options, told):
    testing = pytest.importorskip("typer.testing")
    from kvplug.cli import app

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    asked = ["plan", str(tmp_path), "--pace", str(written(tmp_path, **changes))]
    if options != ["--cache"]:
        asked += ["--cache", "4GiB", *options]
    done = testing.CliRunner().invoke(app, asked)
    assert isinstance(done.exception, ValueError)
    assert told in str(done.exception)


def test_a_file_that_is_not_there_is_told_what_to_write(tmp_path):
    with pytest.raises(ValueError, match="write kvplug bench decode"):
        read_pace(tmp_path / "nothing.json")
