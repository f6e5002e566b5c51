"""What cannot be served right is refused before anything loads, with what to write instead."""

from __future__ import annotations

import json
import os

import pytest

from tests import heads

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


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


FEATURES = [
    {"speculative_algorithm": "NGRAM"},
    {"enable_unified_memory": True},
    {"enable_streaming_session": True},
    {"enable_session_radix_cache": True},
    {"enable_hierarchical_cache": True},
    {"enable_lmcache": True},
    {"enable_unified_cache_external_linker": True},
    {"enable_hisparse": True},
    {"enable_pdmux": True},
    {"enable_two_batch_overlap": True},
    {"dllm_algorithm": "LowConfidence"},
    {"radix_cache_backend": "other"},
]
SPLITS = [
    {"dcp_size": 2, "tp_size": 2},
    {"attn_cp_size": 2, "tp_size": 2},
    {"attn_dp_size": 2, "tp_size": 2},
    {"pp_size": 2},
]


@pytest.mark.parametrize("options", [*FEATURES, *SPLITS], ids=str)
def test_features_that_would_break_a_policy(resolve, options):
    from kvplug_sglang import refusals

    name = next(iter(options))
    with pytest.raises(ValueError, match="kvplug cannot serve this configuration") as refused:
        resolve("snapkv(budget=64)", **options)
    assert {**refusals.FEATURES, **refusals.SPLITS}[name] in str(refused.value)


def test_no_feature_is_left_out():
    """SGLang itself refuses deterministic inference for a backend that it does not know."""
    from kvplug_sglang import refusals

    tried = {next(iter(options)) for options in (*FEATURES, *SPLITS)}
    known = refusals.FEATURES.keys() | refusals.SPLITS.keys()
    assert known - tried == {"enable_deterministic_inference"}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"tp_size": 2}, "gives each rank some heads of a layer"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "beside duo was never run; drop --kv-cache-dtype, or"),
        ({"model": "windowed"}, "layers that see a window, beside which duo was never run"),
        ({"model": "sharing"}, "layers that share a cache, beside which duo was never run"),
    ],
    ids=str,
)
def test_heads_of_two_kinds_are_refused_what_they_were_never_run_with(
    resolve, random_llama, tmp_path, options, reason
):
    from transformers import LlamaConfig

    heads.made({0: [heads.A] * 4}).save(file := tmp_path / "heads.json")
    line = f"duo(keydiff(budget=512), heads={str(file)!r})"
    resolve(line)
    if "model" in options:
        more = {"windowed": APART, "sharing": {"num_kv_shared_layers": 1}}[options["model"]]
        config = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], **more)
        config.save_pretrained(tmp_path)
        options = {"model": tmp_path}
    with pytest.raises(ValueError, match="use keydiff") as caught:
        resolve(line, **options)
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match="is another"):
        resolve(line, random_llama(heads=6))
    with pytest.raises(ValueError, match="cannot read the file of heads 'none'"):
        resolve("duo(keydiff, heads='none')")


def test_deterministic_inference(resolve):
    with pytest.raises(ValueError, match=r"supported for deterministic inference.*'kvplug'"):
        resolve("snapkv(budget=64)", enable_deterministic_inference=True)


BACKUP = {"disaggregation_mode": "decode", "disaggregation_decode_retraction_backup": "cpu_tensor"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"disaggregation_mode": "prefill"}, "drop --disaggregation-mode"),
        ({"disaggregation_mode": "decode"}, "drop --disaggregation-mode"),
        (BACKUP, "drop --disaggregation-mode"),
        ({"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}, "data-parallel attention"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "AMX attention alone; use --kv-cache-dtype auto"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "use --kv-cache-dtype auto"),
        ({"is_embedding": True}, "the model does not generate"),
        (
            {"attention_backend": "torch_native", "decode_attention_backend": "kvplug"},
            "torch_native for prefill and kvplug for decode",
        ),
        (
            {"attention_backend": None, "prefill_attention_backend": "kvplug",
             "decode_attention_backend": "flashinfer"},
            "FlashInfer, whose plan fixes lengths on the host, cannot be wrapped",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_other_configurations(resolve, options, message):
    with pytest.raises(ValueError, match="kvplug cannot serve this configuration") as refused:
        resolve("snapkv(budget=64)", **options)
    assert message in str(refused.value)


def test_a_head_major_cache(resolve, monkeypatch):
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    with pytest.raises(ValueError, match="unset SGLANG_USE_HND_KVCACHE"):
        resolve("quest(budget=64)")


def test_all_reasons_are_said_at_once(resolve):
    with pytest.raises(ValueError, match="kvplug cannot serve") as refused:
        resolve("quest(budget=64)", enable_lmcache=True, kv_cache_dtype="fp8_e4m3", pp_size=2)
    assert str(refused.value).count("\n- ") == 3


def test_a_cache_of_eight_bits_is_for_flash_attention(resolve, monkeypatch):
    from kvplug_sglang import backend

    monkeypatch.setattr(backend, "stock", lambda server_args, device: backend.FLASH)
    resolve("quest(budget=64)", kv_cache_dtype="fp8_e4m3")
    monkeypatch.setattr(backend, "stock", lambda server_args, device: backend.TRITON)
    with pytest.raises(ValueError, match=r"before it is quantised, .* use --kv-cache-dtype auto"):
        resolve("quest(budget=64)", kv_cache_dtype="fp8_e4m3")


def test_dense_is_served_where_a_policy_is_not(resolve):
    resolve("dense", enable_lmcache=True)


@pytest.mark.parametrize(
    "policy, message",
    [
        ("snapkv(bugdet=64)", "Did you mean 'budget'"),
        ('{"policy": "quest", "allow": ["snapkv"]}', "max_budget must say"),
        ('{"policy": "quest"', "a policy line or a JSON object"),
        ("kvzip", "SGLang's tree counts one slot a token; serve it in vLLM"),
        ("blend(links=8) + quest", "was never run beside another policy"),
        ("a_shape(block=48) + quest", "a page of 32 tokens; write a_shape(block=32)"),
    ],
)
def test_bad_policies(resolve, policy, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 -- the message is the table's
        resolve(policy)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"disable_radix_cache": True}, "finds chunks in the prefix cache; drop --disable-radix"),
        ({"enable_lora": True, "lora_paths": []}, "adapters beside blend(links=8) was never run"),
        ({"enable_mixed_chunk": True}, "drop --enable-mixed-chunk, or use the policy 'dense'"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "a quantised cache beside blend(links=8)"),
    ],
    ids=str,
)
def test_what_chunks_taken_from_elsewhere_were_never_run_with(resolve, options, message):
    resolve("blend(links=8)")
    with pytest.raises(ValueError, match="kvplug cannot serve this configuration") as refused:
        resolve("blend(links=8)", **options)
    assert message in str(refused.value)


def test_models_whose_keys_cannot_be_moved(resolve, random_llama, tmp_path):
    config = json.loads((random_llama() / "config.json").read_text())
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": scaled}))
    with pytest.raises(ValueError, match=r"blend\(links=8\) moves keys: .* scaled by 'dynamic'"):
        resolve("blend(links=8)", model=tmp_path)
    resolve("quest", model=tmp_path)


def test_a_file_of_another_model_s_heads_is_refused(resolve, random_llama, tmp_path):
    line = heads.line(tmp_path)
    resolve(line)
    wanted = r"made for tiny \(llama, 2 layers, 4 heads of 64.* is another \(llama, 2 layers, 6 "
    with pytest.raises(ValueError, match=wanted):
        resolve(line, random_llama(heads=6))


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


SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
WHISPER = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128,
    "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, architecture, shape, message",
    [
        ("Whisper", "WhisperForConditionalGeneration", WHISPER, "the model has an encoder"),
        ("Lfm2", "Lfm2ForCausalLM", {**SMALL, "full_attn_idxs": [1]}, "neither Mamba-2 nor gated"),
        ("Llama", "MiniMaxM3SparseForCausalLM", SMALL, "the model selects its own pages"),
        ("Llama", "LlamaForSequenceClassification", SMALL, "the model does not generate"),
    ],
)
def test_models_that_were_never_run(resolve, tmp_path, kind, architecture, shape, message):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**shape, architectures=[architecture])
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which was never run; use the policy 'dense'") as refused:
        resolve("snapkv(budget=64)", model=tmp_path)
    assert message in str(refused.value)


APART = {"is_hybrid_swa": True, "hybrid_layer_pattern": [0, 1], "sliding_window": 64}
SPECIAL = {
    "add --disable-hybrid-swa-memory": APART,
    "keep heads of another shape": {**APART, "swa_head_dim": 16},
    "attend within chunks": {"attention_chunk_size": 64},
}


@pytest.mark.parametrize("message", SPECIAL)
def test_layers_that_no_policy_was_run_beside(resolve, tmp_path, message):
    from transformers import LlamaConfig

    config = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], **SPECIAL[message])
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*use the policy 'dense'"):
        resolve("quest(budget=64)", model=tmp_path)
    resolve("dense", model=tmp_path)
    if message == "add --disable-hybrid-swa-memory":
        resolve("quest(budget=64)", model=tmp_path, disable_hybrid_swa_memory=True)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    from kvplug_evals.models.random_gpt_oss import build_random_gpt_oss

    folder = tmp_path_factory.mktemp("model") / "gpt-oss"
    build_random_gpt_oss(folder)
    return folder


def test_a_model_that_wants_backends_by_name(resolve, gpt_oss, monkeypatch):
    """gpt-oss: SGLang asks for backends that take attention sinks, and is told which one it is."""
    from kvplug_sglang import backend, compat

    with pytest.raises(ValueError, match="torch_native, which kvplug wraps here") as refused:
        resolve("dense", model=gpt_oss)
    assert "GptOssForCausalLM requires one of" in str(refused.value)
    assert "serve it without --attention-backend kvplug" in str(refused.value)
    with pytest.raises(AssertionError, match="torch_native"):
        resolve("dense", model=gpt_oss, attention_backend="torch_native")

    monkeypatch.setattr(backend, "stock", lambda server_args, device: backend.TRITON)
    with pytest.raises(ValueError, match="add --disable-hybrid-swa-memory"):
        resolve("quest(budget=64)", model=gpt_oss)
    one_pool = {"disable_hybrid_swa_memory": True}
    served = resolve("quest(budget=64)", model=gpt_oss, **one_pool)
    assert compat.attention_backends(compat.view(served)) == ("kvplug", "kvplug")
    with pytest.raises(ValueError, match="sinks belong to query heads; use a_shape or tri_shape"):
        resolve("xattention", model=gpt_oss, **one_pool)
    resolve("a_shape", model=gpt_oss, **one_pool)


def test_gemma_4_is_not_served_over_flash_attention(resolve, tmp_path, monkeypatch):
    """SGLang asserts it by name; on Hopper, whose own it is, Triton is wrapped instead."""
    from sglang.srt.arg_groups import model_override_base

    from kvplug_evals.models.random_shared import build_random_gemma4
    from kvplug_sglang import backend, compat

    build_random_gemma4(tmp_path / "gemma4")
    monkeypatch.setattr(model_override_base, "get_default_attn_backend", lambda *_: backend.FLASH)
    monkeypatch.setattr(backend, "stock", lambda server_args, device: backend.TRITON)
    served = resolve("quest", model=tmp_path / "gemma4", disable_hybrid_swa_memory=True)
    assert compat.default_attention(served) == backend.TRITON
    monkeypatch.setattr(backend, "stock", lambda server_args, device: backend.FLASH)
    with pytest.raises(ValueError, match="fa3, which kvplug wraps here"):
        resolve("dense", model=tmp_path / "gemma4")


def test_layers_that_share_a_cache(resolve, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], num_kv_shared_layers=1)
    config.save_pretrained(tmp_path)
    for policy, message in (
        ("snapkv", "snapkv scores by the queries of each layer alone; use keydiff"),
        ('{"policy": "dense", "allow": ["snapkv"], "max_budget": 64}', "use keydiff"),
        ("pyramid(snapkv)", "gives layers different budgets; give them one budget"),
        ("keydiff(chunk=512)", "still read in the same step; leave interval and chunk out"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(policy, model=tmp_path)
    for policy in ("dense", "quest", "twilight", "streaming_llm", "keydiff", "xattention"):
        resolve(policy, model=tmp_path)


def test_pages_of_one_token_beside_recurrent_layers(resolve, tmp_path):
    """Where SGLang's prefix cache has the states of requests that ended, and no others."""
    from kvplug_evals.models.random_hybrid import build_random_granite4

    build_random_granite4(tmp_path / "granite4")
    ended = {
        "model": tmp_path / "granite4", "mamba_radix_cache_strategy": "no_buffer",
        "disable_overlap_schedule": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="add --mamba-radix-cache-strategy extra_buffer"):
        resolve("quest(budget=64)", **ended)
    resolve("quest(budget=64)", **ended, page_size=1)
    resolve("quest(budget=64)", **ended, disable_radix_cache=True)
    resolve("snapkv(budget=64)", **ended)


@pytest.mark.parametrize(
    "policy, message",
    [
        ("snapkv(budget=96)", "keeps 96 tokens of a prompt.*write budget=127 or more"),
        ("pyramid(snapkv(budget=64, window=16), beta=2)", "write budget=127 or more"),
        ("streaming_llm(window=100)", "evicts tokens.*write window=128 or more"),
    ],
)
def test_policies_narrower_than_a_window(resolve, tmp_path, policy, message):
    """As the configuration names it; ``test_windows`` has what a loaded model says."""
    from kvplug_evals.models.random_llama import build_random_gemma3

    build_random_gemma3(tmp_path / "gemma3")
    with pytest.raises(ValueError, match=message):
        resolve(policy, model=tmp_path / "gemma3")
    for served in ("quest(budget=64)", "snapkv(budget=127)", "streaming_llm(window=128)"):
        resolve(served, model=tmp_path / "gemma3")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"page_size": 16}, "pages of 32 or 64 tokens, got --page-size 16; write --page-size 32"),
        ({"page_size": 1}, "write --page-size 32"),
        ({"tp_size": 2}, "tensor parallelism beside kivi(bits=4) was never run"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "codes plain pages, got --kv-cache-dtype fp8_e4m3"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk beside kivi(bits=4) was never run"),
        ({"kv_cache_dtype": "bfloat16"}, "codes plain pages, got --kv-cache-dtype bfloat16"),
        ({"enable_hierarchical_cache": True}, "drop --enable-hierarchical-cache"),
        ({"disaggregation_mode": "prefill"}, "drop --disaggregation-mode"),
        ({"line": "kivi + a_shape"}, "sparse prefill beside kivi(bits=4) was never run"),
        ({"line": "kivi + pyramid(snapkv)"}, "layers of different budgets beside kivi(bits=4)"),
        ({"line": "kivi", "model": "gemma3"}, "the model has layers that see a window"),
        (
            {"line": "kivi", "model": "hybrid", "disable_radix_cache": True},
            "the model has recurrent layers",
        ),
        (
            {"line": "kivi(bits=2)", "model": "narrow"},
            "kivi(bits=2): head_size must be a multiple",
        ),
    ],
    ids=str,
)
def test_what_never_ran_beside_pages_of_codes(resolve, tmp_path, options, message):
    line, model = options.pop("line", "kivi"), options.pop("model", None)
    with pytest.raises(ValueError, match="kvplug cannot serve this configuration") as refused:
        resolve(line, None if model is None else unfit(model, tmp_path), **options)
    assert message in str(refused.value)


def unfit(name, folder):
    import transformers

    from kvplug_evals.models import random_hybrid, random_llama

    if name == "narrow":
        transformers.LlamaConfig(
            hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
            num_hidden_layers=2, vocab_size=512, architectures=["LlamaForCausalLM"],
        ).save_pretrained(folder)  # fmt: skip
    else:
        build = {"gemma3": random_llama.build_random_gemma3,
                 "hybrid": random_hybrid.build_random_granite4}[name]  # fmt: skip
        build(folder)
    return folder


def test_pages_of_codes_have_a_size_and_requests_a_number(resolve):
    found = resolve("kivi + snapkv")
    from kvplug_sglang import compat, refusals

    assert compat.view(found).page_size == 32
    assert compat.view(found).max_running_requests == refusals.REQUESTS
    given = compat.view(resolve("kivi", page_size=64, max_running_requests=12))
    assert (given.page_size, given.max_running_requests) == (64, 12)


def test_layers_are_local_by_the_configuration_alone(resolve):
    for line in ('local(layers="1::2")', 'quest + local(layers="1::2")'):
        with pytest.raises(ValueError, match=r"local\(.*serve it in vLLM, or use streaming_llm"):
            resolve(line)


def test_images_that_see_themselves_both_ways(resolve, tmp_path):
    from transformers import Gemma3Config

    text = {**SMALL, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config=vision, architectures=["Gemma3ForConditionalGeneration"]
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"streaming_llm takes parts.*use snapkv"):
        resolve("streaming_llm(window=128)", model=tmp_path)
    for served in ("snapkv(budget=128)", "twilight"):
        resolve(served, model=tmp_path)


FOREIGN = """
from dataclasses import dataclass
from kvplug import Policy, Stage

@dataclass(frozen=True, kw_only=True)
class Elsewhere(Policy):
    name = "elsewhere"
    stage = Stage.REUSE
"""


def test_policies_of_a_kind_that_nobody_here_carries_out(resolve, tmp_path, monkeypatch):
    """Installed as another package would be: a module and the metadata of its distribution."""
    from kvplug import registry

    metadata = tmp_path / "elsewhere-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[kvplug.policies]\nelsewhere = elsewhere:Elsewhere\n"
    )
    (tmp_path / "elsewhere.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    registry.policy_class.cache_clear()
    with pytest.raises(ValueError, match="the stage 'reuse' that the SGLang adapter cannot carry"):
        resolve("elsewhere")
    registry.policy_class.cache_clear()


def test_what_is_left_open_is_decided(resolve):
    from sglang.srt.arg_groups.model_override_base import resolved_view

    assert resolved_view(resolve("")).page_size == 32, "the default policy selects"
    quest = resolved_view(resolve("quest(budget=64)"))
    assert quest.page_size == 32
    assert quest.cuda_graph_config.decode.backend == "disabled", "there is no graph of a CPU"
    assert resolved_view(resolve("snapkv(budget=64)")).page_size == 1
    assert resolved_view(resolve("quest(budget=64)", page_size=16)).page_size == 16


def test_decode_alone_is_captured():
    from types import SimpleNamespace

    from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config

    from kvplug_sglang import compat

    view = SimpleNamespace(device="cuda", cuda_graph_config=default_cuda_graph_config())
    assert not compat.breaks_decode_graphs(view)
    decided = compat.graphs_of_decode_alone(view)["cuda_graph_config"]
    assert (decided.decode.backend, decided.prefill.backend) == ("full", "disabled")


def test_a_plan_that_would_be_captured_with_its_step(resolve, monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    with pytest.raises(ValueError, match="unset SGLANG_ENABLE_METADATA_GLUE_GRAPH"):
        resolve("quest(budget=64)")
    resolve("dense")


def test_graphs_that_were_never_run(resolve):
    broken = {"decode": {"backend": "breakable"}}
    with pytest.raises(ValueError, match="breakable CUDA graphs of decode were never run"):
        resolve("quest(budget=64)", cuda_graph_config=broken)


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
