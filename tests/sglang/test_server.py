"""Whole servers, as users start them."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.error import HTTPError

import pytest
from sglang_server import serve

from tests.processes import disk_of, mount_disk

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OFFER = json.dumps(
    {
        "policy": "snapkv(budget=64, window=16)",
        "allow": ["quest", "keydiff", "knorm"],
        "max_budget": 4096,
    }
)
PAGE = (2 * 16 + 2) * 2 * 1 * 64 * 4
"""Bytes on one of two ranks: keys, values and digest of two layers, one head of 64, fp32."""


def test_a_hook_that_is_gone_stops_the_server(random_llama, tmp_path):
    """SGLang without one of the functions that a hook stands around, in each of its processes."""
    script = tmp_path / "without.py"
    script.write_text(WITHOUT)
    options = ["--attention-backend", "kvplug", "--kvplug-policy", "snapkv(budget=64)"]
    with (
        pytest.raises(RuntimeError, match="the server did not start") as stopped,
        serve(random_llama(), tmp_path, *options, program=[str(script)]),
    ):
        pass
    log = str(stopped.value)
    assert "kvplug cannot serve with SGLang 0.5.23" in log
    assert "PrefillAdder._request_slot_reserve_for_req: it is gone" in log
    assert "Install sglang==0.5.23, or start without --attention-backend kvplug" in log


WITHOUT = """
import runpy

from sglang.srt.managers.schedule_policy import PrefillAdder

del PrefillAdder._request_slot_reserve_for_req
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@pytest.fixture(scope="module")
def mixed(prompts):
    """Mixed policies and budgets, duplicates, a shared prefix, one token, budgets for all."""
    base, *rest = prompts(300, 521, 700, 333, 61, 730, 100, seed=7)
    return [
        (rest[0], 12),
        (rest[0], 12),
        (rest[1], 12, {"budget": 32}),
        (base + rest[2], 12, "quest(budget=64, dense_layers=0)"),
        (base + rest[3], 12, "keydiff(budget=128) + quest(budget=48, dense_layers=1)"),
        (rest[4], 12, "dense"),
        (rest[5], 12, {"policy": "knorm(budget=48)", "min_context": 64}),
        ([5], 12),
        (rest[4], 12, "quest(budget=4096, dense_layers=0)"),
        (rest[4], 12, "keydiff(budget=4096)"),
    ]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A folder to mount a disk on."""
    folder = tmp_path_factory.mktemp("server") / "disk"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def server(random_llama, disk):
    """TP 2, page size 16, chunk 256, overlap on; its counters on a disk of 4 MiB of their own."""
    strict = {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    }
    options = ["--attention-backend", "kvplug", "--kvplug-policy", OFFER, "--page-size", "16",
               "--tp-size", "2", "--enable-metrics"]  # fmt: skip
    with serve(
        random_llama(), disk.parent, *options,
        begin=partial(mount_disk, str(disk), "4m"), PROMETHEUS_MULTIPROC_DIR=str(disk), **strict,
    ) as server:  # fmt: skip
        yield server


def test_tensor_parallel_mixed_policies_answer_as_alone(server, random_llama, mixed, drawn):
    """And the same as one rank, token for token."""
    of_kvplug = {name for name in drawn if name.startswith("kvplug_")}
    for name in of_kvplug - {"kvplug_refused_requests_total"}:
        seen = server.metric(name)
        probed = "prefill" in name  # /health asks for a token behind a prompt of one
        assert seen == 0 or (probed and seen < 9), "a rate needs to have seen the zero"
    server.ask(*mixed[0])
    assert server.metric("kvplug_saved_bytes_total") == (521 // 16 - 64 // 16) * PAGE
    assert 0 < server.metric("kvplug_packing_seconds_total") < 60
    for name in drawn:
        if name.startswith("sglang:"):
            server.metric(name)
    alone = []
    for request in mixed:
        server.forget()
        alone.append(server.ask(*request)["output_ids"])
    server.forget()
    assert server.ask_all(mixed) == alone
    assert alone[5] == alone[8] == alone[9], "with the whole cache as budget, dense"
    again = server.ask(mixed[0][0] + [7, 8, 9], 4)
    assert again["meta_info"]["cached_tokens"] == 496, "the whole pages below P - W"
    assert server.metric("kvplug_packed_prompts_total") >= 11
    assert server.metric("kvplug_decode_queries_total") > 0
    with pytest.raises(HTTPError) as refused:
        server.ask(mixed[0][0], 4, "streaming_llm")
    assert refused.value.code == 400
    assert "does not allow streaming_llm" in refused.value.read().decode()
    assert server.metric("kvplug_refused_requests_total") == 1
    # SGLang's own checkers, strict while busy and when idle, end a server that loses a slot.
    server.forget()
    assert server.ask(*mixed[0])["output_ids"] == alone[0]
    assert "leak" not in server.log.read_text()
    from conftest import start

    with start(random_llama(), OFFER) as one:
        rids = [one.send(*request) for request in mixed]
        one.drain()
        assert [one.output(rid) for rid in rids] == alone
    with start(random_llama()) as stock:
        assert stock.generate([mixed[5][0]], 12) == [alone[5]]


def fill(folder: Path) -> None:
    with (folder / "rest").open("wb", buffering=0) as rest, suppress(OSError):
        while True:
            rest.write(bytes(4096))


def test_a_full_disk_ends_the_counting_and_nothing_else(server, disk, mixed):
    """The last of this server's: nothing is counted behind it."""
    prompt, tokens = mixed[0]
    expected = server.ask(prompt, tokens)["output_ids"]
    assert server.metric("kvplug_decode_queries_total") > 0
    fill(disk_of(disk))
    for budget in range(100, 130):  # each of them new to the counters
        assert server.ask(prompt, 4, f"knorm(budget={budget})")["output_ids"]
    assert server.ask(prompt, tokens)["output_ids"] == expected
    page = server.get("/metrics")
    assert "sglang:num_running_reqs" in page
    assert "kvplug_" not in page, "it would be wrong"
    [stopped] = [line for line in server.log.read_text().splitlines() if "stopped count" in line]
    assert "No space left on device" in stopped
