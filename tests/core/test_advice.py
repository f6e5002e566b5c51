"""What ``kvplug plan`` reckons, against plain counts and what was measured."""

import json
from pathlib import Path
from statistics import median

import pytest
import torch

from kvplug import parse, read_offer
from kvplug.advice.bounds import Reads, Setup, bounds, pool_bytes, read_traffic
from kvplug.advice.capacity import capacity
from kvplug.advice.card import CARDS, Card, amount, choose_card
from kvplug.advice.model import model_of, read_model
from kvplug.advice.published import ENGINE_FP8, in_class, published, quality_of
from kvplug.advice.ranking import WORTH, advise, commands, usual_lines

ROOT = Path(__file__).parents[2]
LLAMA = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 128256,
    "num_key_value_heads": 8, "intermediate_size": 14336, "torch_dtype": "bfloat16",
}  # fmt: skip
GiB = 1 << 30


def offer(policy):
    return read_offer({"policy": policy}, environ={})


def kept(config):
    """Of each layer: what it keeps of a request, in a letter."""
    letters = []
    for layer in model_of({**LLAMA, **config}).layers:
        letter = "f" if layer.planned else "w" if layer.attends else "r"
        letters.append(letter if layer.owns else letter.upper())
    return "".join(letters)


def test_a_llama_s_figures_are_its_data_sheet_s():
    model = model_of(LLAMA)
    assert model.cache_token() == 2 * 32 * 8 * 128 * 2
    assert model.cache_token(1) == model.cache_token() // 2
    assert model.weights / 2 == pytest.approx(8.03e9, rel=0.01)
    assert model.weights - model.shared == 128256 * 4096 * 2, "a table that is looked up"
    assert model.estimated
    assert model.refused is None
    half = model_of(LLAMA, ranks=2)
    assert (half.cache_token(), half.weights) == (model.cache_token() // 2, model.weights // 2)


@pytest.mark.parametrize(
    "config, layers",
    [
        ({"num_hidden_layers": 3}, "fff"),
        ({"num_hidden_layers": 3, "sliding_window": 64}, "www"),
        ({"num_hidden_layers": 3, "sliding_window": 64, "use_sliding_window": False}, "fff"),
        ({"num_hidden_layers": 4, "sliding_window": 64, "model_type": "gemma2"}, "wfwf"),
        ({"num_hidden_layers": 6, "sliding_window": 64, "sliding_window_pattern": 3}, "wwfwwf"),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64,
             "num_kv_shared_layers": 2},
            "wfWF",
        ),
        ({"layer_types": ["mamba", "attention"], "mamba_d_state": 64}, "rf"),
        ({"hybrid_override_pattern": "M-M*-", "ssm_state_size": 64}, "rrf"),
        ({"layers_block_type": ["mamba", "full_attention", "moe"], "mamba_d_state": 8}, "rf"),
        (
            {"num_hidden_layers": 4, "full_attention_interval": 4, "linear_num_key_heads": 2,
             "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
            "rrrf",
        ),
    ],
)  # fmt: skip
def test_layers_are_read_as_far_as_a_configuration_says(config, layers):
    assert kept(config) == layers


def test_a_recurrent_state_is_counted_once_a_request():
    config = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 32,
    }  # fmt: skip
    recurrent, full = model_of({**LLAMA, **config}).layers
    assert recurrent.state == 2 * (4 * 64 * 32 + (2 * 2 * 64 + 4 * 32) * 3)
    assert full.state == 0


def test_a_step_reads_the_experts_that_its_tokens_ask():
    config = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    model = model_of({**LLAMA, **config})
    asked = model.weights - model.shared
    assert model.read_weights(1) == pytest.approx(model.shared + asked / 4)
    assert model.read_weights(10_000) == pytest.approx(model.weights)


@pytest.mark.parametrize(
    "config, why", [({"kv_lora_rank": 512}, "MLA"), ({"attention_chunk_size": 8192}, "chunks")]
)
def test_models_that_are_refused_get_no_line(config, why):
    model = model_of({**LLAMA, **config})
    assert why in model.refused
    setup = Setup(card=CARDS["h100"], pool=40 * GiB)
    found = advise(model, setup, read_traffic("32000/500@16"))
    assert found.best is None
    assert {line.policy for line in found.lines} == {ENGINE_FP8}


@pytest.mark.parametrize(
    "config, why",
    [
        ({"sliding_window": 512, "layer_types": ["sliding_attention"] * 32}, "see a window"),
        ({"head_dim": 9}, "head_size must be a multiple"),
    ],
)
def test_formats_are_planned_where_they_are_served(config, why):
    model = model_of({**LLAMA, **config})
    setup, comes = Setup(card=CARDS["h100"], pool=40 * GiB), read_traffic("32000/500@16")
    line = "kivi(bits=2)"
    found = advise(model, setup, comes, lines=[line])
    assert why in dict(found.left_out)[line]


def test_pages_in_four_bits_are_a_third_of_plain_ones():
    setup, comes = Setup(card=CARDS["h100"], pool=40 * GiB), read_traffic("32000/500@64")
    lines = ["kivi(bits=4)", "kivi(bits=4) + twilight(budget=0.125, bits=4, dense_layers=0)"]
    found = advise(model_of(LLAMA), setup, comes, lines=lines)
    whole, chosen = (next(x for x in found.lines if x.policy == line) for line in lines)
    dense, layout = found.dense.bounds, parse(lines[0]).format.layout(32, 128, torch.bfloat16)
    assert whole.bounds.read == pytest.approx(dense.read * layout.page_bytes / layout.plain_bytes)
    assert whole.bounds.capacity.requests > 3 * dense.capacity.requests
    # Of what it reads the keys' codes are all of them, and an eighth of the tokens.
    share = (layout.key_bytes + 0.125 * layout.page_bytes) / layout.page_bytes
    assert chosen.bounds.read == pytest.approx(whole.bounds.read * share, rel=0.01)
    assert whole.bounds.first >= dense.first, "a prompt's chunks decode what lies before them"
    assert whole.quality.loss.loss == 0.011


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: read_model("/nowhere"), "config.json"),
        (lambda: model_of({"hidden_size": 64}), "num_hidden_layers"),
        (lambda: model_of({**LLAMA, "torch_dtype": "int3"}), "bfloat16"),
        (lambda: choose_card(None, None, None), "--gpu h100"),
        (lambda: choose_card("h1000", None, None), "Did you mean 'h100'"),
        (lambda: choose_card(None, "80 parsecs", "1TB/s"), "80GiB"),
        (lambda: read_traffic("32000@16"), "32000/500@16"),
        (lambda: read_traffic("0/5@1"), "32000/500@16"),
        (lambda: pool_bytes(model_of(LLAMA), CARDS["l4"], overhead=8 * GiB), "--ranks 2"),
    ],
)
def test_bad_input_is_told_what_to_write(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_amounts():
    assert amount("80GiB", "memory", "") == 80 * GiB
    assert amount("3.35TB/s", "bandwidth", "") == 3.35e12
    assert amount("989 TFLOPS", "arithmetic", "") == 989e12


def test_a_dense_step_is_bytes_over_bandwidth():
    model, card = model_of(LLAMA), Card(name="", memory=0, bandwidth=1e12)
    setup = Setup(card=card, pool=1000 * GiB)
    traffic = read_traffic("32000/500@16")
    found = bounds(model, setup, traffic, offer("dense"))
    read = 131072 * 32250
    assert found.read == read
    assert found.step == pytest.approx((model.shared + 16 * read) / 1e12)
    chunks = [min(end, 32000) for end in range(8192, 40000, 8192)]
    moved = len(chunks) * model.shared + sum(131072 * end for end in chunks)
    assert found.first == pytest.approx(moved / 1e12)
    assert found.rate == pytest.approx(500 / (found.first + 500 * found.step / 16))


def test_arithmetic_bounds_a_prompt_where_the_card_says_it():
    model = model_of(LLAMA)
    setup = Setup(card=CARDS["h100"], pool=1000 * GiB)
    found = bounds(model, setup, read_traffic("32000/500@16"), offer("dense"))
    pairs = 32000 * 32001 / 2
    multiplied = model.shared * 32000 + 32 * 4 * 32 * 128 * pairs
    assert found.first == pytest.approx(multiplied / 989e12)


def test_a_selecting_step_reads_its_tokens_and_the_digests():
    model, setup = model_of(LLAMA), Setup(card=CARDS["h100"], pool=1000 * GiB)
    traffic = read_traffic("32000/512@16")
    found = bounds(model, setup, traffic, offer("quest(budget=2048)"))
    token, seen = 2 * 8 * 128 * 2, 32256
    digests = 2 * (8 * 128 * 2) * (seen // 32)
    assert found.read == 2 * token * seen + 30 * (token * 2048 + digests)


def test_windows_and_shared_caches_are_read_and_not_held_twice():
    config = {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 1024,
        "num_kv_shared_layers": 2,
    }  # fmt: skip
    model, setup = model_of({**LLAMA, **config}), Setup(card=CARDS["h100"], pool=GiB)
    found = bounds(model, setup, read_traffic("32000/2@1"), offer("dense"))
    token = 2 * 8 * 128 * 2
    assert model.cache_token() == token
    assert found.read == 2 * token * (32001 + 1024)


def test_packed_requests_leave_room_for_others_once_their_prompts_are_done():
    given = {"block_size": 32, "prompt": 4000, "tokens": 4100, "in_flight": 512}
    model = model_of({**LLAMA, "num_hidden_layers": 1})
    page = 32 * model.cache_token()
    dense = capacity(model, offer("dense"), 400 * page, **given)
    packed = capacity(model, offer("snapkv(budget=512)"), 400 * page, **given)
    assert (dense.most, dense.settled, dense.together) == (129, 129, 3)
    # All pages and private ones, until the step that packs them; then those and the answer's.
    assert packed.most == 129 + 16
    assert packed.settled == 16 + (129 - 125)
    assert packed.together == 1 + (400 - packed.most) // packed.settled


def test_lines_are_as_good_as_the_published_one_that_reads_no_more():
    whole = quality_of("twilight(budget=0.0625)", 32000)
    assert whole.found.found == 1.0
    assert whole.loss.loss == pytest.approx(0.09, abs=0.005)
    assert whole.sources == (
        "evals/results/recall-tokens-cpu/report.md", "evals/results/smollm2-tokens-cpu/report.md",
    )  # fmt: skip
    assert in_class(whole, "close")
    more = quality_of("twilight(budget=0.15625)", 32000)
    assert more.loss.policy.startswith("twilight(budget=0.15625")
    assert not quality_of("twilight(budget=0.01)", 32000).measured
    assert quality_of("twilight(budget=0.0625, dense_layers=0)", 32000).loss is None
    assert not quality_of("twilight(budget=0.0625, candidates=0.5)", 32000).measured
    quest = quality_of("quest(budget=0.21875)", 32000)
    assert quest.loss.loss == pytest.approx(1.95, abs=0.005)
    assert not in_class(quest, "near")
    assert in_class(quest, "any")


@pytest.mark.parametrize(
    "line", [each for each in usual_lines(32000) if " + twilight" not in each]
)
def test_every_usual_line_was_measured(line):
    assert quality_of(str(parse(line)), 32000).measured


def test_a_published_row_names_a_file_that_is_there():
    assert len(published()) > 150
    for source in {row.source for row in published()}:
        assert (ROOT / source).exists(), source


def test_long_prompts_on_a_large_card_gain_by_reading_less():
    model = model_of(LLAMA)
    setup = Setup(card=CARDS["h100"], pool=pool_bytes(model, CARDS["h100"]))
    found = advise(model, setup, read_traffic("32000/500@16"))
    assert found.best.policy == "twilight(budget=0.0625)"
    assert found.best.gain > 1.3
    assert [line.qualifies for line in found.lines] == sorted(
        (line.qualifies for line in found.lines), reverse=True
    )


def test_short_prompts_gain_nothing_and_short_answers_by_their_prompts_alone():
    model = model_of(LLAMA)
    setup = Setup(card=CARDS["h100"], pool=pool_bytes(model, CARDS["h100"]))
    assert advise(model, setup, read_traffic("500/200@1")).best is None
    prefill = advise(model, setup, read_traffic("16000/2@1"))
    assert prefill.best.policy.startswith("xattention")
    assert all(x.gain < 1.02 for x in prefill.lines if x.policy.startswith(("twi", "quest")))


SERVED = {
    file.stem: json.loads(file.read_text()) for file in ROOT.glob("results/bench/serve-*.json")
}
"""What ``kvplug bench serve`` saved."""
SERVED_MODEL = model_of(
    {
        "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 32, "head_dim": 128,
        "num_key_value_heads": 8, "vocab_size": 4096, "intermediate_size": 4, "dtype": "float32",
    }
)  # fmt: skip
"""Its recall model with an 8B Llama's heads."""


def served(report, arithmetic=None):
    """The setup of those servers."""
    ran = report["settings"]
    card = Card(name="", memory=GiB, bandwidth=10e9, arithmetic=arithmetic)
    return Setup(
        card=card, pool=ran["kv_cache_mib"] << 20, block_size=ran["block_size"],
        chunk=ran["chunk"], steps=1,
    )  # fmt: skip


def rates(report, load):
    """Median tokens a second of each policy; none where the load was left out."""
    return {
        cell["policy"]: median(sent["output_tokens_per_second"] for sent in cell["sent"])
        for cell in report["cells"]
        if cell["load"] == load
    }


@pytest.mark.parametrize("tokens", [4096, 16384, 32768])
def test_the_advice_is_what_whole_servers_showed(tokens):
    """``kvplug bench serve`` over requests that fit: twilight lost at 4K, where its digests leave
    the pool room for one less, and gained at 16K and 32K."""
    report = SERVED[f"serve-{tokens // 1024}k-cpu"]
    ran, model, setup = report["settings"], SERVED_MODEL, served(report)
    traffic = read_traffic(f"{tokens}/{ran['output']}@{ran['batch']}")
    measured = rates(report, "batch")
    gained = measured["twilight(dense_layers=0)"] > measured["dense"]
    line = "twilight(budget=0.0625, dense_layers=0)"
    found = advise(model, setup, traffic, "any", [line])
    twilight = next(each for each in found.lines if each.policy == line)
    # Prompts were cached by an earlier turn: what counts are the answers.
    dense = found.dense.bounds
    faster = twilight.bounds.at_once / twilight.bounds.step > dense.at_once / dense.step
    assert (faster and not twilight.crowded) == gained == (tokens > 4096)
    if not gained:
        assert (twilight.bounds.at_once, dense.at_once) == (1, 2)
        assert advise(model, setup, traffic, "close", [line]).best is None


@pytest.mark.parametrize("load", ["batch", "memory"])
@pytest.mark.parametrize("name", sorted(SERVED))
def test_a_line_that_gained_nothing_in_a_server_is_not_advised(name, load):
    """Of prompts that are computed, at the arithmetic that dense's own new prompts showed: on a
    CPU they are most of a request, and what a step saves is little of it."""
    report, measured = SERVED[name], rates(SERVED[name], load)
    others = {line: rate for line, rate in measured.items() if line != "dense"}
    lost = [line for line, rate in others.items() if rate < WORTH * measured["dense"]]
    assert len(lost) == (4 if name == "serve-4k-cpu" else 0)
    ran = report["settings"]
    at_once = ran["batch"] if load == "batch" else ran["requests"]
    for line in lost:
        traffic = read_traffic(f"{ran['tokens']}/{ran['output']}@{at_once}")
        setup = served(report, arithmetic_of_prompts())
        found = advise(SERVED_MODEL, setup, traffic, "any", [line])
        ours = next(each for each in found.lines if each.policy == line)
        assert ours.gain < WORTH, line
        assert found.best is None or found.best.policy != line


def arithmetic_of_prompts():
    """Multiplications a second of dense's new prompts, answers left out, by ``serve-4k-cpu``."""
    report = SERVED["serve-4k-cpu"]
    ran, rate = report["settings"], rates(report, "memory")["dense"]
    traffic = read_traffic(f"{ran['tokens']}/{ran['output']}@1")
    work = Reads(SERVED_MODEL, served(report), traffic, offer("dense"), 4).prompt_work()[1]
    return work / (ran["output"] / rate)


def test_commands_name_the_line_for_both_engines():
    setup = Setup(card=CARDS["h100"], pool=GiB)
    vllm, sglang = commands("m", "quest(budget=64)", setup, read_traffic("900/100@2"), 2)
    assert "--attention-backend kvplug" in vllm
    assert '"policy": "quest(budget=64)"' in vllm
    assert "--tensor-parallel-size 2" in vllm
    assert "--max-model-len 1000" in vllm
    assert "--kvplug-policy 'quest(budget=64)'" in sglang
    assert "--tp 2" in sglang


def test_the_command_prints_a_table_or_json(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from kvplug.cli import app

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked = ["plan", str(tmp_path), "--gpu", "h100", "--policy", "quest(budget=0.3)"]
    shown = testing.CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "vllm serve" in shown.output
    assert "sglang.launch_server" in shown.output
    found = json.loads(testing.CliRunner().invoke(app, [*asked, "--json", "-"]).output)
    assert found["best"] == "twilight(budget=0.0625)"
    assert found["model"]["kv_bytes_per_token"] == 131072
    assert "quest(budget=0.3)" in [line["policy"] for line in found["lines"]]
    short = [*asked[:2], "--gpu", "h100", "--traffic", "500/200@1"]
    assert "do not use kvplug here" in testing.CliRunner().invoke(app, short).output
