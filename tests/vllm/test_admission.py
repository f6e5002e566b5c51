"""Each engine of a process judges its own requests, and its core judges once more."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.pace import Pace
from tests.vllm.test_refused import configure

SERVED = ["length", 8]


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.timeout(900)
def test_of_three_engines_each_judges_by_its_own_offer(random_llama, tmp_path):
    out = tmp_path / "out.json"
    Pace.starts += 3
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.three_engines", str(random_llama()), str(out)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["first"][0] == [SERVED]
    assert "does not allow quest. Known: dense, snapkv." in found["first"][1]
    assert "does not allow snapkv" in found["second"][0]
    assert "Known: dense, quest." in found["second"][0]
    assert found["second"][1] == [SERVED]
    assert all("was started without it" in said for said in found["stock"])
    assert found["stock, nothing asked"] == [1, 2, 3]
    # What reaches a core all the same fails alone there.
    assert found["let through"] == [SERVED, ["error", 0], SERVED]
    assert found["later"] == [SERVED]


@pytest.mark.parametrize(
    "policy, given, refused",
    [
        ("quest(budget=64, dense_layers=0)", {}, True),
        ("quest(budget=256)", {}, False),
        ("quest(budget=64)", {"min_context": 204}, False),
        ("quest(budget=64)", {"min_context": 202}, True),
        ("knorm(budget=64)", {}, True),
        ("pyramid(knorm(budget=256))", {}, True),
        ("streaming_llm(sinks=4, window=64)", {}, False),
        ("dense", {}, False),
    ],
)
def test_an_llms_beams_are_judged_by_what_is_done_to_them(
    random_llama, monkeypatch, policy, given, refused
):
    """By the longest that one becomes: 200 tokens and 4."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    config = configure(random_llama(), {"policy": policy, **given})
    engine = SimpleNamespace(vllm_config=config)  # and not what the stock search asks of it next
    llm = SimpleNamespace(llm_engine=engine, _preprocess_cmpl=list)
    prompts = [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [1] * 200}]
    wanted = (
        (VLLMValidationError, "serve it under 'dense'")
        if refused
        else (AttributeError, "input_processor")
    )
    with pytest.raises(wanted[0], match=wanted[1]):
        BeamSearchOfflineMixin.beam_search(llm, prompts, BeamSearchParams(2, 4))


def test_vllm_still_has_what_a_request_is_judged_by():
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    def parameters(function):
        return list(inspect.signature(function).parameters)

    admitted = parameters(InputProcessor.process_inputs)
    assert admitted[:4] == ["self", "request_id", "prompt", "params"]
    assert parameters(EngineCore.preprocess_add_request) == ["self", "request"]
    assert parameters(BeamSearchOnlineMixin.beam_search)[:4] == [
        "self", "prompt", "request_id", "params",
    ]  # fmt: skip
    assert "extra_args" not in BeamSearchParams.__struct_fields__, (
        "vLLM hands a beam search what the user said: delete compat.announce_beams' half of it"
    )
