"""What vLLM's own ``/metrics`` says of kvplug, nothing set for it, against what was served."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.nursery import TORCH, open_nursery
from tests.pace import Pace

httpx = pytest.importorskip("httpx")

from kvplug import parse  # noqa: E402
from kvplug_evals.served.engine import NAME  # noqa: E402
from kvplug_evals.served.start import serve  # noqa: E402
from kvplug_evals.served.vllm import VLLM  # noqa: E402
from kvplug_sglang import metrics as in_sglang  # noqa: E402
from kvplug_vllm import counters, metrics  # noqa: E402

PAGE, TOKENS, LAYERS = 32, 40, 6  # of the first of SmolLM2
BLOCK_BYTES = LAYERS * 2 * PAGE * 3 * 64 * 4  # keys and values, 3 heads of 64, float32
PROMPTS = (900, 1001, 96, 3)


@dataclass(frozen=True, kw_only=True)
class Server(VLLM):
    more: tuple[str, ...] = ()
    kv_cache_mib: int = 512
    dtype: str = "float32"
    """A CPU without instructions for bfloat16 takes eight times as long over it."""

    def command(self, policy, port):
        return [*super().command(policy, port), *self.more]


def shown(page: str) -> dict[str, dict[str, float]]:
    """Name -> label's value -> count, of kvplug's counters."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("kvplug_"):
                (label,) = sample.labels.values()
                found.setdefault(sample.name, {})[label] = sample.value
    return found


def served(model, policy, tmp_path, **options) -> tuple[dict[str, float], str, Path]:
    """Each of PROMPTS and TOKENS behind it -> kvplug's counts, the whole page, the log."""
    log = tmp_path / "server.log"
    prompts = [[(7 * n + i) % 40000 for n in range(length)] for i, length in enumerate(PROMPTS)]
    Pace.starts += 1
    with serve(Server(model=model, **options), policy, log) as server:
        request = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        for prompt in prompts:
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json={"model": NAME, "prompt": prompt, **request},
                timeout=120,
            )
            assert answer.status_code == 200, answer.text
        page = httpx.get(f"{server.url}/metrics").text
    found = shown(page)
    assert all(list(counts) == [str(parse(policy))] for counts in found.values()), found
    return {name: next(iter(counts.values())) for name, counts in found.items()}, page, log


def decoded(prompt: int) -> range:
    """Tokens that each decode query of a request sees with dense attention."""
    return range(prompt + 1, prompt + TOKENS)


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(900)
def test_a_server_shows_what_it_compressed_and_read(smollm2, tmp_path, drawn):
    policy = "snapkv(budget=512, window=32) + quest(budget=256, dense_layers=2)"
    found, page, log = served(smollm2, policy, tmp_path)
    long = [prompt for prompt in PROMPTS if prompt // PAGE > 512 // PAGE]
    assert long == [900, 1001]

    def visible(prompt: int, tokens: int) -> int:
        return tokens - prompt // PAGE * PAGE + 512 if prompt in long else tokens

    def spared(tokens: int) -> int:
        return max(-(-tokens // PAGE) - 256 // PAGE, 0) * PAGE

    queries = [(prompt, tokens) for prompt in PROMPTS for tokens in decoded(prompt)]
    seen = [visible(prompt, tokens) for prompt, tokens in queries]
    whole = [prompt // PAGE for prompt in long]
    digest = 3 * 2 * 64 * 4 * LAYERS  # minimum and maximum of each head's keys in a page
    read = sum(seen) - sum(map(spared, seen)) * (LAYERS - 2) / LAYERS
    scanned = sum(-(-tokens // PAGE) * PAGE for tokens in seen if spared(tokens))
    scanned *= (LAYERS - 2) / LAYERS
    seconds = found.pop("kvplug_packing_seconds_total")
    assert found == {
        "kvplug_decode_queries_total": len(queries),
        "kvplug_cached_tokens_total": sum(tokens for _, tokens in queries),
        "kvplug_read_tokens_total": pytest.approx(read),
        "kvplug_cached_bytes_total": sum(tokens for _, tokens in queries) * BLOCK_BYTES / PAGE,
        "kvplug_read_bytes_total": pytest.approx((read * BLOCK_BYTES + scanned * digest) / PAGE),
        "kvplug_packed_prompts_total": 2,
        "kvplug_kept_tokens_total": sum(512 + prompt % PAGE for prompt in long),
        "kvplug_dropped_tokens_total": sum(prompt // PAGE * PAGE - 512 for prompt in long),
        "kvplug_returned_blocks_total": sum(whole),
        "kvplug_saved_bytes_total": (sum(whole) - 2 * 512 // PAGE) * (BLOCK_BYTES + digest),
        "kvplug_prefill_queries_total": sum(PROMPTS),
        "kvplug_prefill_cached_tokens_total": sum(n * (n + 1) / 2 for n in PROMPTS),
        "kvplug_prefill_read_tokens_total": sum(n * (n + 1) / 2 for n in PROMPTS),
    }
    assert 0 < seconds < 60
    names = {f.name for f in text_string_to_metric_families(page)}
    assert {name for name in drawn if name.startswith("vllm:")} <= names
    (line,) = [line for line in log.read_text().splitlines() if "kvplug: snapkv" in line]
    assert "min_context 0, no token protected" in line
    assert "holds 17 blocks of 32 tokens once its prompt is done, 256 before" in line
    assert "reads 256 of them" in line


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(900)
def test_and_so_do_two_api_servers_of_one_engine(smollm2, tmp_path):
    policy = "streaming_llm(sinks=32, window=480)"
    more = ("--api-server-count", "2")
    found, _, log = served(smollm2, policy, tmp_path, more=more)
    # Before its last step a request of n tokens gave back what its query no longer sees.
    gone = [max((p + TOKENS - 1 - 480) // PAGE - 1, 0) for p in PROMPTS]
    assert found["kvplug_packed_prompts_total"] == 0
    assert found["kvplug_decode_queries_total"] == len(PROMPTS) * (TOKENS - 1)
    assert found["kvplug_returned_blocks_total"] == sum(gone)
    assert found["kvplug_saved_bytes_total"] == sum(gone) * BLOCK_BYTES
    assert "holds at most " in log.read_text()


def test_sglang_counts_the_same_by_the_same_names():
    by_policy = {counter.name: counter.help for counter in metrics.BY_POLICY}
    assert by_policy == in_sglang.BY_POLICY
    assert {counter.label for counter in metrics.BY_POLICY} == {"policy"}
    assert (metrics.REFUSED.name, metrics.REFUSED.help) == in_sglang.REFUSED


def test_the_dashboard_asks_for_counters_that_exist(dashboard, drawn):
    names = {str(counter) for counter in metrics.ALL}
    names.add(f"kvplug_{in_sglang.WHOLE[0]}_total")
    assert {name for name in drawn if name.startswith("kvplug_")} == names
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = [tuple(panel["gridPos"][axis] for axis in "xywh") for panel in dashboard["panels"]]
    assert all(x + w <= 24 for x, _, w, _ in places)
    assert len(set(places)) == len(places)
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= {
                "policy", "reason", "instance", "engine",
            }  # fmt: skip


def child(code: str, **environment: str) -> subprocess.Popen[str]:
    start = "import sys; from kvplug_vllm import metrics\n"
    with open_nursery(TORCH):
        return subprocess.Popen(
            [sys.executable, "-c", start + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **environment}, text=True,
        )  # fmt: skip


def run(code: str, **environment: str) -> None:
    process = child(code, **environment)
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_processes_that_meet_are_added_up_and_others_are_not(tmp_path):
    server = """
import multiprocessing
from prometheus_client import generate_latest, REGISTRY
import kvplug_vllm

def work(folder, amount):
    Meeting.join(folder)
    add(metrics.QUERIES, amount, "a policy")
    metrics.count_returned("a policy", 5, 2, 10)

if __name__ == "__main__":
    Files.register(); Files.register()
    assert b"kvplug" not in generate_latest(REGISTRY) and Meeting.folder is None
    for method, amount in (("spawn", 2), ("fork", 30)):
        context = multiprocessing.get_context(method)
        process = context.Process(target=work, args=(Meeting.enter(), amount))
        process.start(); process.join(); assert process.exitcode == 0
    metrics.count_refused("max_budget")
    print(generate_latest(REGISTRY).decode())
"""
    script = tmp_path / "server.py"
    head = "from kvplug_vllm.counters import *; from kvplug_vllm import metrics\n"
    script.write_text(head + server)
    with open_nursery(TORCH):
        running = [
            subprocess.Popen(
                [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "TMPDIR": str(tmp_path)},
            )
            for _ in range(2)
        ]  # fmt: skip
    for process in running:
        page, _ = process.communicate(timeout=120)
        assert shown(page) == {
            "kvplug_decode_queries_total": {"a policy": 32},
            "kvplug_returned_blocks_total": {"a policy": 10},
            "kvplug_saved_bytes_total": {"a policy": 60},
            "kvplug_refused_requests_total": {"max_budget": 1},
        }
    assert list(tmp_path.iterdir()) == [script], "each took its folder with it"


def test_clients_that_name_any_number_of_policies_do_not_fill_the_page(tmp_path):
    code = "[metrics.add(metrics.QUERIES, 1, f'quest(budget={n})') for n in (*range(500), 7)]"
    run(f"{code}; metrics.count_refused('x')", PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    registry = CollectorRegistry()
    counters.MultiProcessCollector(registry, path=str(tmp_path))
    page = shown(generate_latest(registry).decode())
    queries = page["kvplug_decode_queries_total"]
    assert len(queries) == 101
    assert (queries["quest(budget=7)"], queries["others"]) == (2, 400)
    assert page["kvplug_refused_requests_total"] == {"x": 1}


def test_what_a_killed_server_left_goes_when_the_next_one_counts(tmp_path):
    code = "metrics.count_refused('x'); print('counted', flush=True); sys.stdin.read()"
    killed, living = (child(code, TMPDIR=str(tmp_path)) for _ in range(2))
    for process in (killed, living):
        assert process.stdout.readline() == "counted\n"
    assert len(list(tmp_path.iterdir())) == 2
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    run("metrics.count_refused('x')", TMPDIR=str(tmp_path))
    (left,) = tmp_path.iterdir()
    assert list(left.glob(f"*{living.pid}.db")), "the living one's"
    for process in (killed, living):
        process.communicate()
    assert not list(tmp_path.iterdir())


def test_where_vllm_gathers_files_itself_they_go_there(tmp_path):
    run("metrics.count_refused('x')", PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    registry = CollectorRegistry()
    counters.MultiProcessCollector(registry, path=str(tmp_path))
    assert shown(generate_latest(registry).decode()) == {"kvplug_refused_requests_total": {"x": 1}}


def said(code: str, **environment: str) -> str:
    """What a process that counts, and must not fail by it, writes into its log."""
    with open_nursery(TORCH):
        done = subprocess.run(
            [sys.executable, "-c", f"{COUNTING}\n{code}"],
            env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


COUNTING = """
import resource, tempfile
from prometheus_client import REGISTRY, generate_latest
from kvplug_vllm import counters, metrics
counters.Files.register()
page = lambda: generate_latest(REGISTRY).decode()
"""


@pytest.mark.parametrize(
    "lost, why",
    [
        ("", "No such file or directory"),
        (
            "tempfile.tempdir, tempfile._candidate_tempdir_list = None, list",
            "No usable temporary directory",
        ),
    ],
)
def test_where_no_file_can_be_kept_nothing_is_counted(tmp_path, lost, why):
    nowhere = {} if lost else {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "gone")}
    code = f"{lost}\ncounters.Meeting.invite()" + "\nmetrics.count_refused('x')" * 3
    log = said(f"{code}\nassert 'kvplug' not in page()", **nowhere)
    assert log.count("stopped counting") == log.count(why) == 1


def test_counters_that_cannot_be_kept_are_absent_not_wrong(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
metrics.count_refused("x")
assert 'kvplug_refused_requests_total{reason="x"} 1.0' in page()
for n in range(5):
    metrics.count_returned(f"quest(budget={n})", 5, 2, 10)
metrics.count_refused("x")
assert "kvplug" not in page()
"""
    assert said(code, TMPDIR=str(tmp_path)).count("stopped counting") == 1


def test_a_scrape_answers_whatever_became_of_the_files(tmp_path):
    code = """
metrics.count_refused("x")
for spoiled in (b"", (64).to_bytes(4, "little") + b"{" * 60):
    (counters.Meeting.folder / "counter_other.db").write_bytes(spoiled)
    assert "python_info" in page() and "kvplug" not in page()
(counters.Meeting.folder / "counter_other.db").unlink()
assert "kvplug_refused_requests_total" in page()
"""
    assert said(code, TMPDIR=str(tmp_path)).count("cannot be read") == 1


def test_a_folder_that_is_taken_away_ends_the_counting(tmp_path):
    code = """
import shutil
metrics.count_refused("x")
shutil.rmtree(counters.Meeting.folder)
metrics.count_refused("x"); metrics.count_refused("x")
assert "kvplug" not in page()
"""
    assert said(code, TMPDIR=str(tmp_path)).count("was removed") == 1
