"""Which of SGLang's own kernels serve, and what the start-up line and doctor say of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

RESULTS = Path(__file__).parents[2] / "results/gpu"


@pytest.fixture
def card(monkeypatch):
    """A server's arguments on a card whose default attention is ``name``."""
    from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config

    from kvplug_sglang import compat

    def card(name, cache="auto", prefill="disabled"):
        graphs = default_cuda_graph_config()
        graphs.prefill.backend = prefill
        view = SimpleNamespace(device="cuda", kv_cache_dtype=cache, cuda_graph_config=graphs)
        monkeypatch.setattr(compat, "default_attention", lambda server_args: name)
        monkeypatch.setattr(compat, "view", lambda server_args: view)

    return card


@pytest.mark.parametrize(
    ("default", "cache", "wrapped"),
    [
        ("fa3", "auto", "fa3"),  # Hopper
        ("fa3", "fp8_e5m2", "triton"),  # which FlashAttention 3 cannot read
        ("trtllm_mha", "auto", "triton"),  # Blackwell
        ("flashinfer", "auto", "triton"),  # Ampere, Ada
        ("aiter", "auto", "triton"),  # AMD
    ],
)
def test_flash_attention_3_is_kept_where_it_is_the_cards_default(card, default, cache, wrapped):
    from kvplug_sglang import backend

    card(default, cache)
    assert backend.stock(None, "cuda") == wrapped


def test_the_start_up_line_names_them_and_what_is_given_up(card):
    from kvplug_sglang import backend

    card("fa3")
    assert backend.kernels(None) == (
        "SGLang's fa3 attention, its own default here; prefill is not captured in graphs; "
        "never run on a GPU"
    )
    card("trtllm_mha", prefill="breakable")
    said = backend.kernels(None)
    assert "SGLang's triton attention in place of trtllm_mha, its own default here" in said
    assert "prefill and what no policy shortens may be slower" in said
    assert "not captured" not in said


def test_it_is_said_to_have_run_on_a_gpu_once_results_are_there():
    from kvplug_sglang import backend

    ran = any(RESULTS.glob("sglang*")) if RESULTS.exists() else False
    assert (backend.ON_A_GPU == "never run on a GPU") is not ran


def test_doctor_resolves_a_server(random_llama, monkeypatch):
    from kvplug_sglang import doctor

    monkeypatch.setenv("KVPLUG_POLICY", "dense")
    model = str(random_llama())
    healthy = {check.name: check for check in doctor.checks(model, "quest(budget=64)")}
    assert all(check.passed for check in healthy.values()), healthy
    assert "sglang 0.5.23" in healthy["versions"].detail
    assert healthy["model"].detail == (
        "nothing is refused; it would be served over SGLang's torch_native attention"
    )
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    *_, refused = doctor.checks(model, "quest(budget=64)")
    assert not refused.passed
    assert "unset SGLANG_ENABLE_METADATA_GLUE_GRAPH" in refused.detail
