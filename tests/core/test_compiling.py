"""Contexts that are compiled: what scores them, when they are packed, what is read of them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from kvplug import Planner, PromptKV, Refused, Settings, parse, read_offer
from kvplug.compiling import REQUEST, Server, repetitions
from kvplug.policies import kvzip as module
from kvplug.policies.kvzip import KVzip

KVPRESS = np.load(Path(__file__).parent / "fixtures/kvpress.npz")
CHUNK, S = 64, 16
LINE = f"kvzip(budget=0.25, chunk={CHUNK})"


def chunk(keys, queries, begin, end, sinks, scale):
    """[1, n, H, D], [1, W, H, G, D]: a context up to ``end``, and its tokens from ``begin`` on."""
    return PromptKV(
        keys=keys[:, begin:end],
        values=keys[:, begin:end],
        queries=queries,
        lengths=torch.tensor([end - begin]),
        scale=scale,
        page_size=1,
        repeated=keys[:, end:],
        first=keys[:, : min(begin, sinks)],
    )


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("block", [1, 1 << 12, 1 << 24])
def test_kvpress_scores_the_same(monkeypatch, case, block):
    monkeypatch.setattr(module, "BLOCK", block)
    begin, end, sinks = KVPRESS[f"kvzip {case}/shape"].tolist()
    keys = torch.from_numpy(KVPRESS[f"kvzip {case}/keys"]).float()
    queries = torch.from_numpy(KVPRESS[f"kvzip {case}/queries"])
    given = chunk(keys, queries, begin, end, sinks, keys.shape[3] ** -0.5)
    expected = torch.from_numpy(KVPRESS[f"kvzip {case}/score"])
    torch.testing.assert_close(KVzip().score(given), expected, rtol=1e-5, atol=1e-6)


def test_each_key_has_the_most_that_a_query_gives_it():
    torch.manual_seed(0)
    keys, queries = torch.randn(1, 40, 2, 8), torch.randn(1, 12, 2, 3, 8)
    score = KVzip().score(chunk(keys, queries, 16, 28, 4, 0.5))
    for h in range(2):
        shares = []
        for row in range(12):
            among = [*range(4), *range(16, 28 + row + 1)]
            for g in range(3):
                logits = 0.5 * keys[0, among, h] @ queries[0, row, h, g]
                shares.append(logits.softmax(0)[4:16])
        torch.testing.assert_close(score[0, h], torch.stack(shares).amax(0))


def steps(*each):
    return tuple(np.array([n]) for n in each)


def test_a_repetition_is_packed_at_its_end_and_nothing_else_is():
    own = Settings(policy=parse(LINE), protect=((70, 75),))
    plain = Planner(own, S).schedule
    assert plain.events(*steps(0, 500, 300)) == []
    schedule = Planner(Settings(policy=own.policy, protect=own.protect, repeats=True), S).schedule
    prompt = 3 * CHUNK  # two chunks, and the second again
    assert schedule.events(*steps(0, prompt - 1, prompt)) == []
    (event,) = schedule.events(*steps(prompt - 1, prompt, prompt))
    assert event.pages == range(4, 8), "the second chunk"
    assert event.repeated == range(8, 12)
    assert (event.into, event.kept, event.stay, event.in_place) == (8, 1, S, False)
    assert (event.first, event.protect, event.phase) == (4, [(6, 11)], 1)
    assert schedule.scorer(event).sinks == 0
    (event,) = schedule.events(*steps(0, 2 * CHUNK, 2 * CHUNK))
    assert (event.pages, event.repeated, event.first) == (range(0, 4), range(4, 8), 0)
    assert schedule.scorer(event).sinks == 4


@pytest.mark.parametrize("compiled", [0, 1, 3])
def test_a_query_sees_what_was_kept_of_the_chunks_that_its_request_found(compiled):
    planner = Planner(Settings(policy=parse(LINE), compiled=compiled), S)
    begin = compiled * CHUNK
    segments = planner.plan(*steps(begin, 300, 250))
    assert segments.first.tolist() == [compiled * 4] * len(segments.row)
    assert segments.kept.tolist() == [compiled] * len(segments.row)
    assert planner.held_pages(compiled).tolist() == [4 * n for n in range(compiled)]
    assert segments.untouched == (not compiled)


def test_a_request_says_that_it_compiles_and_nothing_else():
    offer = read_offer({"policy": LINE}, environ={})
    assert offer.settings_for(REQUEST).repeats
    assert offer.settings_for(REQUEST) == offer.settings_for({"compile": True})
    for wrong in ({"compile": False}, {"compile": 3}, {"compile": True, "budget": 0.5}):
        with pytest.raises(ValueError, match=r'write \{"compile": true\}'):
            offer.settings_for(wrong)
    with pytest.raises(Refused, match=r"lets no request choose"):
        offer.settings_for("kvzip(budget=0.5, chunk=64)")
    for other in ({"policy": "keydiff(budget=0.25, chunk=64)"}, {"policy": "dense"}, {}):
        with pytest.raises(Refused, match=r'start it with \{"policy": "kvzip\(budget=0.25'):
            read_offer(other, environ={}).settings_for(REQUEST)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"policy": "dense", "allow": ["kvzip"], "max_budget": 64}, "kvzip serves alone"),
        ({"policy": LINE, "allow": ["quest"]}, "cannot share a server with other policies"),
        ({"policy": f"{LINE} + quest"}, "write kvzip.* alone"),
        ({"policy": "kvzip(budget=512)"}, r"write kvzip\(budget=0.25, chunk=512\)"),
        ({"policy": "kvzip(chunk=None)"}, r"write kvzip\(budget=0.25, chunk=512\)"),
        ({"policy": "kvzip(interval=64)"}, r"write kvzip\(budget=0.25, chunk=512\)"),
        ({"policy": LINE, "min_context": 512}, "others may find it packed"),
        ({"policy": LINE, "compiled": 3}, "no setting 'compiled'"),
        ({"policy": LINE, "repeats": True}, "no setting 'repeats'"),
    ],
)
def test_what_a_server_cannot_be_started_with(given, said):
    with pytest.raises(ValueError, match=said):
        read_offer(given, environ={})


def test_a_prompt_that_compiles_ends_with_its_last_chunk_again():
    offer = read_offer({"policy": LINE}, environ={})
    asked, context = offer.settings_for(REQUEST), list(range(3 * CHUNK + 5))
    prompts = list(repetitions(context, CHUNK))
    assert [len(prompt) for prompt in prompts] == [2 * CHUNK, 3 * CHUNK, 4 * CHUNK]
    for prompt in prompts:
        offer.check_prompt(asked, S, prompt, 1)
        for wrong, answer in (
            (prompt, 2), (prompt, None), (prompt[1:], 1), (prompt[:-CHUNK], 1),
            ([*prompt[:-1], 0], 1), (prompt + prompt[:S], 1), ((), 1),
        ):  # fmt: skip
            with pytest.raises(Refused, match="up to a multiple of 64 tokens"):
                offer.check_prompt(asked, S, wrong, answer)
    with pytest.raises(Refused, match="images or audio cannot be compiled"):
        offer.check_prompt(asked, S, None, 1)
    for free in (context, None):
        offer.check_prompt(offer.settings, S, free, 7)
    with pytest.raises(ValueError, match="write chunk=512"):
        list(repetitions(context, 0))


METRICS = """\
vllm:cache_config_info{{block_size="16",num_gpu_blocks="99"}} 1.0
kvplug_packed_prompts_total{{policy="{}"}} 0.0
"""


@pytest.fixture
def server():
    """What vLLM's server answers, and what it was asked."""
    asked: list[tuple[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            page = METRICS.format(self.server.policy)
            models = json.dumps({"data": [{"id": "MODEL"}]})
            self.answer(200, {"/metrics": page, "/v1/models": models}[self.path])

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            text = body.get("prompt") or body["messages"][0]["content"]
            tokens = {"tokens": list(text.encode())} if self.path == "/tokenize" else {}
            refused = self.path != "/tokenize" and self.server.refuses
            self.answer(400 if refused else 200, json.dumps(tokens))

        def answer(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as started:
        started.policy, started.refuses, started.asked = str(parse(LINE)), False, asked
        started.url = f"http://127.0.0.1:{started.server_port}"
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.mark.parametrize("role", [None, "system"])
def test_a_servers_context_is_sent_chunk_by_chunk(server, role):
    text, told = "a context " * 20, []
    found = Server(server.url).compile(text, role, lambda *done: told.append(done))
    assert (found.tokens, found.chunk, found.chunks) == (200, CHUNK, 3)
    assert (found.blocks, found.kept, found.policy) == (12, 3, str(parse(LINE)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    (_, first), *rest = server.asked
    assert first == (
        {"model": "MODEL", "prompt": text}
        if role is None
        else {
            "model": "MODEL", "messages": [{"role": "system", "content": text}],
            "add_generation_prompt": False,
        }
    )  # fmt: skip
    assert [body["prompt"] for _, body in rest] == list(repetitions(text.encode(), CHUNK))
    assert {path for path, _ in rest} == {"/v1/completions"}
    assert all(body["vllm_xargs"] == {"kvplug": REQUEST} for _, body in rest)
    assert all(body["max_tokens"] == 1 for _, body in rest)


def test_what_a_server_says_against_it_is_said(server):
    server.refuses = True
    with pytest.raises(ValueError, match="v1/completions answered 400"):
        Server(server.url).compile("a context " * 20)
    server.policy = "quest(budget=2048)"
    with pytest.raises(ValueError, match=r"compiles no contexts.*quest.*start it with"):
        Server(server.url).compile("a context")
    with pytest.raises(ValueError, match="does not answer"):
        Server("http://127.0.0.1:9").compile("a context")


def test_the_command_s_figures_as_json(server, tmp_path, capfd):
    pytest.importorskip("typer")
    from kvplug.cli import app

    (file := tmp_path / "context.txt").write_text("a context " * 20)
    asked = ["compile", "--file", str(file), "--url", server.url, "--json"]
    app([*asked, "-"], standalone_mode=False)
    printed = capfd.readouterr()
    app([*asked, str(tmp_path / "figures.json")], standalone_mode=False)
    shown = capfd.readouterr()
    for found in (json.loads(printed.out), json.loads((tmp_path / "figures.json").read_text())):
        assert found.pop("seconds") > 0
        assert found == {
            "policy": str(parse(LINE)), "tokens": 200, "chunk": CHUNK, "chunks": 3, "blocks": 12,
            "kept": 3,
        }  # fmt: skip
    for text in (printed.err, shown.out):
        assert "192 were compiled in 3 chunks" in text
