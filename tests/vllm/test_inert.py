"""Installed but not selected, nothing changes; selected but dense, it is the stock engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pace import Pace

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.timeout(900)]

SCRIPT = """
import json, sys
from pathlib import Path

from vllm import LLM, SamplingParams
from tests.pace import Pace

model, prompts, out, selected = sys.argv[1:]
options = {"attention_backend": "kvplug", "additional_config": {"kvplug": {"policy": "dense"}}}
llm = LLM(
    model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
    kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True,
    **(options if selected == "yes" else {}),
)
core = llm.llm_engine.engine_core.engine_core
layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
outputs = llm.generate(
    [{"prompt_token_ids": p} for p in json.loads(prompts)],
    SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False),
    use_tqdm=False,
)
Path(out).write_text(json.dumps({
    "specs": [repr(g.kv_cache_spec) for g in core.scheduler.kv_cache_config.kv_cache_groups],
    "blocks": core.scheduler.kv_cache_config.num_blocks,
    "backends": sorted({type(layer.impl).__module__ for layer in layers.values()}),
    "tokens": [list(o.outputs[0].token_ids) for o in outputs],
}))
"""


def served(tmp_path, model, prompts, *, installed: bool, selected: bool) -> dict[str, object]:
    out = tmp_path / f"{installed}-{selected}.json"
    # VLLM_PLUGINS is vLLM's own allow-list: kvplug might as well not be installed.
    plugins = {} if installed else {"VLLM_PLUGINS": "none"}
    Pace.starts += 1
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), json.dumps(prompts), str(out),
         "yes" if selected else "no"],
        env={**os.environ, **plugins}, capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(Path(out).read_text())


def test_installed_but_not_selected_changes_nothing(random_llama, prompts, tmp_path):
    model, batch = random_llama(), prompts(400, 90, 1)
    absent = served(tmp_path, model, batch, installed=False, selected=False)
    idle = served(tmp_path, model, batch, installed=True, selected=False)
    dense = served(tmp_path, model, batch, installed=True, selected=True)
    assert absent["backends"] == ["vllm.v1.attention.backends.cpu_attn"]
    assert idle == absent
    assert dense == {**absent, "backends": ["kvplug_vllm.cpu"]}
