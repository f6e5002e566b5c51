"""``kvplug eval`` and its forced decoding, through SGLang: from the command line to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvplug_evals.engines.interface import (
    EngineError,
    EngineOptions,
    Request,
    Wave,
)
from kvplug_evals.engines.start import start_engine
from kvplug_evals.models.random_llama import build_random_gemma3
from tests.processes import runs

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
RECALL = ROOT / ".models" / "recall"
QUEST, SNAPKV = "quest(budget=512, dense_layers=0)", "snapkv(budget=512)"
SELECTS = "quest(budget=128, dense_layers=0)"
SUITE = """
about: A small one of the recall suite's kind.
model: recall
tokens: [2048]
contexts: 3
turns: 3
dtype: float32
tasks:
  kvplug_recall: {pairs: 256, hops: 4}
"""
"""A CPU without instructions for bfloat16 takes eight times as long over it."""


@pytest.fixture(autouse=True, scope="module")
def path() -> Iterator[None]:
    """What this process imports, its children import too: the stand-ins are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


def kvplug_eval(*options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kvplug_evals.cli", "eval", "--engine", "sglang", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    suite = folder / "small.yaml"
    suite.write_text(SUITE)
    out = folder / "out"
    code, said = kvplug_eval(
        "--model", "recall", "--suite", str(suite), "--policy", "dense", "--policy", QUEST,
        "--policy", SNAPKV, "--no-baselines", "--out", str(out),
    )  # fmt: skip
    assert code == 0, said
    return out


def metrics(out: Path, policy: str) -> dict[str, Any]:
    for file in out.glob("*/metrics.json"):
        config = json.loads(file.with_name("config.json").read_text())
        if config["policy"].startswith(policy):
            found: dict[str, Any] = json.loads(file.read_text())["kvplug_recall"]
            return found
    raise AssertionError(f"there is no {policy} in {out}")


def test_dense_recalls_everything_and_later_turns_hit_the_prefix_cache(out: Path) -> None:
    dense = metrics(out, "dense")
    assert dense["fixed"] == 1.0
    assert dense["agreement"] == 1.0
    assert dense["loss"] < 0.01
    assert dense["questions"] == 9
    cached = [turn["cached_tokens"] for turn in dense["turns"]]
    assert cached[0] == 0
    assert all(tokens >= 2000 for tokens in cached[1:])
    assert dense["read_per_step"] == dense["cached_per_step"]
    pages = dense["held_bytes"] / (32 * 4096)
    assert pages == pytest.approx(dense["cached_per_step"] / 32, abs=3)


def test_a_selection_reads_less_and_answers_less(out: Path) -> None:
    dense, quest = metrics(out, "dense"), metrics(out, "quest")
    assert quest["fixed"] < 0.7
    assert quest["loss"] > dense["loss"] + 1
    assert quest["read_per_step"] < 0.3 * dense["read_per_step"]
    assert quest["held_bytes"] == pytest.approx(dense["held_bytes"] * 33 / 32, rel=0.03)
    report = (out / "report.md").read_text()
    assert "sglang 0.5.23" in report
    for plot in out.glob("*.png"):
        assert f"]({plot.name})" in report


def test_an_evictor_holds_less(out: Path) -> None:
    dense, snapkv = metrics(out, "dense"), metrics(out, "snapkv")
    assert snapkv["held_bytes"] < 0.5 * dense["held_bytes"]
    assert snapkv["peak_bytes"] > snapkv["held_bytes"], "the prompts were held until compressed"
    assert all(turn["cached_tokens"] >= 1900 for turn in snapkv["turns"][1:])


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    """Prompts in several chunks; answers of several lengths, true and false ones."""
    from transformers import AutoTokenizer

    from kvplug_evals.models.recall import recall_prompt, word

    encode = AutoTokenizer.from_pretrained(RECALL)
    requests = []
    for number, tokens in enumerate((800, 701, 410, 800)):
        prompt = recall_prompt(tokens, 100, 2, seed=number, hops=4, disjoint=True)
        right, other = prompt.answers
        forced = [right, [right[0], other[0], right[2]], other * 4, []][number]
        requests.append(
            Request(
                key=str(number),
                prompt=encode(f"{prompt.text} {word(prompt.questions[0])}").input_ids,
                forced=list(forced),
                scored=max(0, len(forced) - number),
                new_tokens=(5, 3, 6, 4)[number],
            )
        )
    return requests


@pytest.fixture(scope="module")
def likely(asked: list[Request]) -> Request:
    """A false answer, all of it scored."""
    return replace(asked[1], scored=len(asked[1].forced))


@dataclass(frozen=True)
class Chosen:
    """Of requests that choose for themselves."""

    wave: Wave
    """One that does not, and one that does."""
    alone: Wave
    """That one again."""
    block_bytes: int
    refused: str


@pytest.fixture(scope="module")
def chosen() -> list[Chosen]:
    return []


@pytest.fixture(scope="module")
def answered(
    asked: list[Request], likely: Request, chosen: list[Chosen]
) -> tuple[Wave, Wave, tuple[float, bool]]:
    """At once, with overlap and chunks; then the first alone, from a cache that was emptied; and
    what lm-eval is told of another. At last requests that choose for themselves."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from transformers import AutoTokenizer

    import kvplug_evals.lm  # noqa: F401  registers the models

    options = EngineOptions(
        model=str(RECALL), max_model_len=1600, max_num_seqs=4, kv_cache_mib=64,
        max_num_batched_tokens=256, dtype="float32", allow=("quest",),
    )  # fmt: skip
    engine = start_engine("sglang", "dense", options)
    try:
        together = engine.run(asked)
        engine.forget()
        alone = engine.run(asked[:1])
        decode = AutoTokenizer.from_pretrained(RECALL).decode
        instance = Instance(
            request_type="loglikelihood", doc={}, idx=0, metadata=("mine", 0, 1),
            arguments=(decode(likely.prompt), decode(likely.forced)),
        )  # fmt: skip
        lm = get_model("kvplug-sglang")(str(RECALL), engine=engine)
        [likelihood] = lm.loglikelihood([instance])
        full = Request(key="full", prompt=(asked[0].prompt * 2)[:1590], new_tokens=8)
        assert len(engine.run([full]).replies[0].tokens) == 8, "the most that is let in"
        with pytest.raises(EngineError, match=r"long needs 2,\d+ tokens .* serves 1,598"):
            engine.run([Request(key="long", prompt=asked[0].prompt, new_tokens=2000)])
        reads_less = replace(asked[0], key="quest", policy=SELECTS)
        both = engine.run([asked[0], reads_less])
        again = engine.run([reads_less])
        with pytest.raises(EngineError) as refused:
            engine.run([replace(asked[0], policy=SNAPKV)])
        chosen.append(Chosen(both, again, engine.block_bytes, str(refused.value)))
    finally:
        engine.close()
    assert engine.server.process.process.returncode is not None
    assert not engine.server.process.log.exists()
    return together, alone, likelihood


@torch.inference_mode()
def expected(request: Request) -> tuple[list[float], list[bool], list[int]]:
    """Losses and agreement of the forced tokens, and what is decoded behind them, by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(RECALL).eval()
    text = request.prompt + request.forced
    logits = model(torch.tensor([text])).logits[0, len(request.prompt) - 1 : -1].float()
    wanted = torch.tensor(request.forced, dtype=torch.long)
    losses = -logits.log_softmax(-1)[torch.arange(len(wanted)), wanted]
    agreed = logits.argmax(-1) == wanted
    free: list[int] = []
    for _ in range(request.new_tokens):
        free.append(int(model(torch.tensor([text + free])).logits[0, -1].argmax()))
    skipped = len(request.forced) - request.scored
    return losses[skipped:].tolist(), agreed[skipped:].tolist(), free


def test_forced_tokens_cost_what_the_model_says_of_them(
    asked: list[Request], answered: tuple[Wave, Wave, tuple[float, bool]]
) -> None:
    verdicts = []
    for request, reply in zip(asked, answered[0].replies, strict=True):
        losses, agreed, free = expected(request)
        assert reply.key == request.key
        assert reply.losses == pytest.approx(losses, rel=1e-3, abs=0.01)
        assert reply.agreed == agreed
        assert reply.tokens == free, "they follow from what was forced"
        assert reply.prompt_tokens == len(request.prompt)
        verdicts += agreed
    assert True in verdicts
    assert False in verdicts


def test_lm_eval_is_told_the_models_own_log_likelihood(
    likely: Request, answered: tuple[Wave, Wave, tuple[float, bool]]
) -> None:
    losses, agreed, _ = expected(likely)
    assert answered[2] == (pytest.approx(-sum(losses), rel=1e-3), all(agreed))
    assert answered[2][0] < -10
    assert not all(agreed)


def test_together_is_as_alone(answered: tuple[Wave, Wave, tuple[float, bool]]) -> None:
    together, alone = answered[0].replies[0], answered[1].replies[0]
    assert alone.cached_tokens == 0
    assert (together.tokens, together.agreed) == (alone.tokens, alone.agreed)
    assert together.losses == pytest.approx(alone.losses, rel=1e-3, abs=0.01)
    assert 0 < alone.token_seconds < alone.first_token_seconds


def test_what_a_wave_holds_and_reads(
    asked: list[Request], answered: tuple[Wave, Wave, tuple[float, bool]]
) -> None:
    together = answered[0]
    pages = sum(-(-len(request.prompt) // 32) for request in asked)
    assert together.held_blocks == pytest.approx(pages, abs=12), "less the prefix that all share"
    assert together.peak_blocks >= together.held_blocks
    assert together.read == together.cached
    assert together.queries > sum(len(r.forced) + r.new_tokens - 1 for r in asked)


def test_a_request_s_own_policy_is_served_beside_the_server_s(
    answered: tuple[Wave, Wave, tuple[float, bool]], chosen: list[Chosen]
) -> None:
    """As ``kvplug calibrate --quality`` asks: dense, and lines that requests choose, of one."""
    (found,) = chosen
    dense, quest = found.wave.replies
    first = answered[0].replies[0]
    assert (dense.tokens, dense.agreed) == (first.tokens, first.agreed)
    assert dense.losses == pytest.approx(first.losses, rel=1e-3, abs=0.01)
    assert quest.losses != pytest.approx(first.losses, rel=1e-3, abs=0.01)
    assert quest.cached_tokens > 700, "of the same prefix"
    assert quest.losses == pytest.approx(found.alone.replies[0].losses, rel=1e-3, abs=0.01)
    assert found.alone.read < 0.3 * found.alone.cached
    assert found.alone.read < found.wave.read < found.wave.cached
    assert "snapkv" in found.refused
    assert "quest" in found.refused


def test_blocks_are_as_large_as_what_requests_may_choose_makes_them(
    answered: tuple[Wave, Wave, tuple[float, bool]], chosen: list[Chosen]
) -> None:
    """A digest lies in every page, whoever reads it."""
    assert chosen[0].block_bytes == pytest.approx(32 * 4096 * 33 / 32, rel=0.005)


def test_forced_tokens_under_policies_of_requests(
    engine: Any, random_llama: Any, prompts: Any
) -> None:
    """``kvplug`` and forced tokens side by side in custom_params, many requests at once, some of
    them retracted: each goes on where it was."""
    from kvplug_evals.engines.forced_sglang import FORCED, SCORED, SCORES, ForcedTokens

    policies = ["snapkv(budget=64, window=16)", "dense"]
    offer = json.dumps({"policy": "dense", "allow": ["snapkv"], "max_budget": 512})
    batch = prompts(371, 204, 143, 388, 256, 300, 271, 119, 340, 224, seed=4)
    small = {"max_total_tokens": 1536, "schedule_conservativeness": 0.05}
    processors = {"enable_custom_logit_processor": True}

    def send(server: Any, number: int, forced: list[int]) -> str:
        custom = {"kvplug": policies[number % 3 > 0], FORCED: forced, SCORED: len(forced)}
        rid: str = server.send(batch[number], 120, custom_params=custom, ignore_eos=False)
        server._inbox[-1].custom_logit_processor = ForcedTokens.to_str() if forced else None
        return rid

    with engine(random_llama(), offer, **processors) as roomy:
        rids = [send(roomy, number, []) for number in range(len(batch))]
        roomy.drain()
        free = [roomy.output(rid) for rid in rids]
        assert free[0] != roomy.generate([batch[0]], 120, "dense", ignore_eos=False)[0]
    with engine(random_llama(), offer, **processors, **small) as server:
        rids = [send(server, number, tokens[:60]) for number, tokens in enumerate(free[:-1])]
        wrong = send(server, len(batch) - 1, [7, 8, 9])
        server.drain()
        assert sum(server.requests[rid].retraction_count for rid in rids), "too much room"
        for rid, tokens in zip(rids, free[:-1], strict=True):
            assert server.output(rid) == tokens
            scores = server.requests[rid].customized_info[SCORES]
            assert len(scores) == len(tokens[:60])
            assert all(agreed and logprob < 0 for logprob, agreed in scores)
        assert server.output(wrong)[:3] == [7, 8, 9]
        assert not any(agreed for _, agreed in server.requests[wrong].customized_info[SCORES])


def test_a_killed_evaluation_leaves_no_server() -> None:
    """Any process in the server's place."""
    code = (
        "import os, sys, time; from kvplug_evals.engines.sglang import Server\n"
        "sleeps = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "server = Server(sleeps, dict(os.environ)).process; server.log.unlink()\n"
        "print(server.process.pid, flush=True); time.sleep(600)"
    )
    evaluation = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert evaluation.stdout is not None
    server = int(evaluation.stdout.readline())
    assert runs(server)
    evaluation.kill()
    evaluation.communicate()
    deadline = time.monotonic() + 30
    while runs(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(server)


@pytest.mark.parametrize(
    "options, policy, message",
    [
        ({"model": "nowhere"}, "dense", "no model in nowhere; run make models"),
        ({"multiprocess": False}, "dense", "drop --in-process"),
        ({}, "qest", "Did you mean 'quest'"),
        ({"model": "{windowed}"}, "knorm(budget=64)", "(?s)windowed layers.*another --policy"),
    ],
)
def test_what_cannot_run_says_what_to_do(
    options: dict[str, Any], policy: str, message: str, tmp_path: Path
) -> None:
    given = {"model": str(RECALL), "max_model_len": 1600, "max_num_seqs": 4, **options}
    if given["model"] == "{windowed}":
        build_random_gemma3(tmp_path)
        given["model"] = str(tmp_path)
    with pytest.raises(EngineError, match=message):
        start_engine("sglang", policy, EngineOptions(**given))


def test_the_command_says_what_to_do(tmp_path: Path) -> None:
    code, said = kvplug_eval("--suite", "smoke", "--in-process", "--out", str(tmp_path))
    assert code == 1
    assert "drop --in-process" in " ".join(said.split())
    assert "Traceback" not in said
