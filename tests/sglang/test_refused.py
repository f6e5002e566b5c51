"""What cannot be served right is refused before anything loads, with what to write instead."""

from __future__ import annotations

import os

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture
def resolve(random_llama, monkeypatch):
    """Resolve a server's arguments as its launcher does."""

    def resolve(policy, model=None, **options):
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import ServerArgs

        load_plugins()
        monkeypatch.setenv("KVPLUG_POLICY", policy)
        arguments = ServerArgs(
            model_path=str(model or random_llama()), device="cpu",
            **{"attention_backend": "kvplug", "max_total_tokens": 4096, **options},
        )  # fmt: skip
        arguments.resolve_once()
        return arguments

    return resolve


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speculative_algorithm": "NGRAM"}, "drop --speculative-algorithm"),
        ({"disaggregation_mode": "prefill"}, "drop --disaggregation-mode"),
        ({"enable_unified_memory": True}, "drop --enable-unified-memory"),
        ({"enable_streaming_session": True}, "drop --enable-streaming-session"),
        ({"enable_session_radix_cache": True}, "drop --enable-session-radix-cache"),
        ({"enable_hierarchical_cache": True}, "drop --enable-hierarchical-cache"),
        ({"enable_hisparse": True}, "drop --enable-hisparse"),
        ({"dcp_size": 2, "tp_size": 2}, "drop --dcp-size"),
        ({"pp_size": 2}, "use --tp-size"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "use --kv-cache-dtype auto"),
        ({"radix_cache_backend": "other"}, "drop --radix-cache-backend"),
        (
            {"attention_backend": "torch_native", "decode_attention_backend": "kvplug"},
            "give --attention-backend kvplug alone",
        ),
    ],
)
def test_features_that_would_break_a_policy(resolve, options, message):
    with pytest.raises(ValueError, match="kvplug cannot serve this configuration") as refused:
        resolve("snapkv(budget=64)", **options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "policy, message",
    [
        ("snapkv(bugdet=64)", "Did you mean 'budget'"),
        ("pyramid(snapkv(budget=256))", "none would be freed; use snapkv(budget=256"),
        ('{"policy": "quest", "allow": ["snapkv"]}', "max_budget must say"),
        ('{"policy": "quest"', "a policy line or a JSON object"),
    ],
)
def test_bad_policies(resolve, policy, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 -- the message is the table's
        resolve(policy)
    assert message in str(refused.value)


def test_models_whose_cache_has_no_keys(resolve, tmp_path):
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(
        num_hidden_layers=2, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=32, q_lora_rank=None,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        vocab_size=128, architectures=["DeepseekV2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multi-head latent attention"):
        resolve("dense", model=tmp_path)


@pytest.mark.parametrize("policy", ["knorm(budget=64)", "quest(budget=64)"])
def test_windowed_layers(resolve, tmp_path, policy):
    from kvplug_evals.models.random_llama import build_random_gemma3

    build_random_gemma3(tmp_path / "gemma")
    with pytest.raises(ValueError, match="the model has windowed layers"):
        resolve(policy, model=tmp_path / "gemma")


def test_what_is_left_open_is_decided(resolve):
    from sglang.srt.arg_groups.model_override_base import resolved_view

    assert resolved_view(resolve("")).page_size == 32, "the default policy selects"
    quest = resolved_view(resolve("quest(budget=64)"))
    assert quest.page_size == 32
    assert quest.cuda_graph_config.decode.backend == "disabled"
    assert resolved_view(resolve("snapkv(budget=64)")).page_size == 1
    assert resolved_view(resolve("quest(budget=64)", page_size=16)).page_size == 16


def test_the_flag_needs_the_backend():
    import argparse

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    line = ["--model-path", "m", "--kvplug-policy", "quest(budget=64)"]
    before = os.environ.get("KVPLUG_POLICY")
    with pytest.raises(ValueError, match="--kvplug-policy needs --attention-backend kvplug"):
        ServerArgs.from_cli_args(parser.parse_args(line))
    assert os.environ.get("KVPLUG_POLICY") == before
    try:
        ServerArgs.from_cli_args(parser.parse_args([*line, "--attention-backend", "kvplug"]))
        assert os.environ["KVPLUG_POLICY"] == "quest(budget=64)"
    finally:
        os.environ.pop("KVPLUG_POLICY", None)
