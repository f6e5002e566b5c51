"""``kvplug bench idle``: what is asked, what is made of the answers, and one small real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

rich = pytest.importorskip("rich.console")
pytest.importorskip("httpx")

from kvplug_evals.bench import idle  # noqa: E402
from kvplug_evals.bench.idle import Case, Options, Turns  # noqa: E402
from kvplug_evals.served.choose import configure  # noqa: E402
from kvplug_evals.served.sglang import SGLang  # noqa: E402
from kvplug_evals.served.vllm import VLLM  # noqa: E402

RECALL = Path(__file__).parents[2] / ".models" / "recall"
SMALL = {"sessions": 4, "tokens": 512, "output": 6, "fit": 1.5, "host_fit": 2}


def options(out: Path, *cases: str, **changed: object) -> Options:
    given = {**SMALL, **changed}
    return Options(cases=idle.cases(cases), out=out, command="kvplug bench idle", **given)


def test_a_case_is_a_policy_and_where_its_pages_go():
    assert Case.read("dense") == Case(policy="dense", host=None)
    found = Case.read("twilight on kivi(bits=4)")
    assert (found.policy.split("(")[0], found.host) == ("twilight", "kivi(bits=4)")
    assert str(Case.read("dense on plain")) == "dense on plain"
    assert len(idle.cases(["dense", "dense on plain", "dense on plain"])) == 2
    with pytest.raises(ValueError, match="unknown policy 'dens'"):
        Case.read("dens on plain")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"sessions": 2}, "--sessions 2 do not push each other out of a pool that holds 1.5"),
        ({"host_fit": 0.5}, "--host-fit must be the plain sessions that the host holds"),
    ],
)
def test_sessions_that_would_show_nothing_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path / "idle.json", **changed)


def test_an_engine_without_such_host_memory_is_refused(tmp_path):
    asked = options(tmp_path / "idle.json")
    with pytest.raises(ValueError, match="SGLang has no host memory that kvplug knows of"):
        idle.run(asked, SGLang(model=RECALL), rich.Console(quiet=True), idle.save)


def test_a_server_is_told_where_its_pages_go():
    def transfer(host: str | None) -> dict[str, object] | None:
        command = VLLM(model=RECALL, host=host, host_mib=3).command("dense", 1)
        if "--kv-transfer-config" not in command:
            return None
        found = json.loads(command[command.index("--kv-transfer-config") + 1])
        assert found["kv_connector"] == "OffloadingConnector"
        return found["kv_connector_extra_config"]

    assert transfer(None) is None
    assert transfer("stock") == {"cpu_bytes_to_use": 3 << 20}
    assert transfer("kivi(bits=4)") == {
        "cpu_bytes_to_use": 3 << 20, "format": "kivi(bits=4)", "spec_name": "HostPages",
        "spec_module_path": "kvplug_vllm.host",
    }  # fmt: skip


def test_a_table_stands_beside_the_numbers(tmp_path, monkeypatch):
    source = {
        "command": "kvplug bench idle", "date": "", "commit": "", "vllm": "0", "torch": "0",
        "cpu": "", "cores": 2, "load_at_start": 0.0, "load_at_end": 0.0,
    }  # fmt: skip
    monkeypatch.setattr(idle, "provenance", lambda command, engine: source)
    asked = options(tmp_path / "idle.json", "dense on kivi(bits=8)")
    run = idle.Run(options=asked, engine=VLLM(model=RECALL), host_mib=8)
    dense = Turns(
        held_mib=0, host_mib=0, room=0, cached=0.01, loaded_mib=0, ttft_ms=2000, replies=["a b"]
    )
    kept = Turns(
        held_mib=0,
        host_mib=1.25,
        room=6.4,
        cached=0.97,
        loaded_mib=5,
        ttft_ms=100,
        replies=["a c"],
    )
    run.turns = [dense, kept]
    idle.save(run)
    text = (tmp_path / "idle.txt").read_text()
    rows = [line.split() for line in text.splitlines() if line.startswith(" dense  ")]
    assert rows[0] == ["dense", "0.0", "1%", "2,000", "100%"]
    assert "1.25 6.4 97% 5.0 100 50%" in " ".join(text.split())
    found = json.loads((tmp_path / "idle.json").read_text())
    assert [server["case"] for server in found["servers"]] == ["dense", "dense on kivi(bits=8)"]


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(900)
def test_sessions_that_were_pushed_out_come_back_from_coded_pages(tmp_path):
    engine = configure("vllm", RECALL, {"dtype": "float32", "threads": 1})
    asked = options(tmp_path / "idle.json", "dense on kivi(bits=8)")
    run = idle.run(asked, engine, rich.Console(quiet=True), idle.save)
    dense, kept = run.turns
    assert dense.cached < 0.5
    assert kept.cached > 0.9
    assert dense.host_mib == dense.loaded_mib == dense.held_mib == kept.held_mib == 0
    plain = SMALL["tokens"] // 32 * idle.block_bytes(engine) / idle.MiB
    assert 3.2 < plain / kept.host_mib < 3.8  # of 32 bits; the last page is often not full
    assert kept.room > SMALL["sessions"]
    # First turns computed everything; a question of a second one may have no right answer.
    assert kept.replies[: SMALL["sessions"]] == dense.replies[: SMALL["sessions"]]
    assert run.as_dense(kept) > 0.7
