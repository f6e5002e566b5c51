"""What cannot be served right is refused before an engine starts, with what to do instead."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from vllm import logger as vllm_logger

from kvplug import Refused
from kvplug_vllm.admission import settings_for
from kvplug_vllm.refusals import refusals
from tests import heads

LOCAL = "local(layers='1::2')"
KIVI = {"policy": "kivi(bits=4)"}
PAGES = {"block_size": 32}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2}

# (engine arguments, kvplug's settings, what the error must say)
REFUSED = [
    ({}, {"policy": "qest"}, ["unknown policy 'qest'", "Did you mean 'quest'"]),
    (
        {},
        {"policy": "quest(budget=0)"},
        ["budget must be a number of tokens", "quest(budget=2048)"],
    ),
    ({}, {"polcy": "quest"}, ["no setting 'polcy'", "Did you mean 'policy'"]),
    ({}, {"policy": "quest", "min_context": -1}, ["min_context must be a number of tokens"]),
    ({}, {"policy": "quest", "protect": [[5, 5]]}, ["protect must be", '{"protect": 256}']),
    ({}, {"policy": "quest + quest"}, ["both answer the stage 'load'"]),
    ({}, {"policy": "dense + quest"}, ["dense is the absence of a policy"]),
    (
        {"block_size": 64},
        {"policy": "a_shape(block=96)"},
        ["a block of 96 queries is neither", "a page of 64 tokens; write a_shape(block=64)"],
    ),
    ({"block_size": 32}, {"policy": "xattention(stride=64)"}, ["write xattention(stride=32)"]),
    ({}, {"policy": "block_quest(threshold=0.9) + twilight"}, ["leave threshold out"]),
    (
        {"block_size": 128},
        KIVI,
        ["kivi(bits=4) codes pages of 32 or 64 tokens, got blocks of 128", "--block-size 32"],
    ),
    ({**PAGES, "kv_cache_dtype": "fp8"}, KIVI, ["codes plain pages, got --kv-cache-dtype fp8"]),
    (
        {**PAGES, "speculative_config": NGRAM},
        KIVI,
        ["beside kivi(bits=4) was never run; drop --speculative-config, or leave kivi out"],
    ),
    ({**PAGES, "kv_offloading_size": 1}, KIVI, ["a KV connector beside kivi(bits=4)"]),
    (
        {**PAGES, "tensor_parallel_size": 2},
        {"policy": "host(pages=32) + quest(budget=1024, dense_layers=0)"},
        ["tensor parallelism beside host was never run; drop --tensor-parallel-size"],
    ),
    (
        PAGES,
        {"policy": "kivi(bits=4) + pyramid(snapkv)"},
        ["layers of different budgets beside kivi(bits=4)"],
    ),
    (PAGES, {"policy": f"kivi + {LOCAL}"}, ["layers that see a window by the policy beside"]),
    (PAGES, {"policy": "kivi + xattention"}, ["sparse prefill beside kivi(bits=4)"]),
    (PAGES, {**KIVI, "allow": ["a_shape"]}, ["sparse prefill beside kivi(bits=4)"]),
    (
        {**PAGES, "disable_hybrid_kv_cache_manager": True},
        KIVI,
        ["a cache group of its own", "drop --disable-hybrid-kv-cache-manager"],
    ),
    (PAGES, {**KIVI, "min_context": 64}, ["the format of all pages", '{"min_context": 0}']),
    ({}, "quest", ['must be a mapping such as {"policy":']),
    (
        {},
        {"policy": "dense", "alow": ["quest"]},
        ["no setting 'alow'. Did you mean 'allow'", "protect, allow, max_budget."],
    ),
    (
        {"additional_config": {"policy": "quest(budget=512)"}},
        None,
        ["--additional-config has 'policy' and no 'kvplug'", 'write {"kvplug": {"policy": "…"}}'],
    ),
    (
        {"additional_config": {"KVPlug": {"policy": "quest"}}},
        None,
        ["--additional-config has 'KVPlug' and no 'kvplug'"],
    ),
    (
        {"kv_offloading_size": 1},
        {"policy": "snapkv"},
        ["leaves holes among them or packs them", "drop --kv-offloading-size, or"],
    ),
    (
        {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
        {"policy": "streaming_llm"},
        ["speculative decoding by 'ngram_gpu' with streaming_llm", '{"method": "ngram", '],
    ),
    (
        {"speculative_config": NGRAM},
        {"policy": "quest(budget=512, top_p=0.9)"},
        ["speculative decoding with quest", "leave top_p out, or use twilight"],
    ),
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        {"policy": "quest"},
        ["the KV connector ExampleConnector is not known", "drop --kv-transfer-config"],
    ),
    (
        {
            "kv_offloading_size": 1,
            "kv_transfer_config": {
                "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec"}
            },
        },
        {"policy": "quest"},
        ["serve other engines too", "use CPUOffloadingSpec, drop --kv-offloading-size"],
    ),
    (
        {"kv_offloading_size": 1},
        {"policy": "dense", "allow": ["quest"]},
        ["one's answer to another of another policy"],
    ),
    (
        {"kv_cache_dtype": "int8_per_token_head"},
        {"policy": "quest"},
        ["int8_per_token_head keeps a scale beside each token", "--kv-cache-dtype fp8 or auto"],
    ),
    (
        {"kv_cache_dtype": "fp8_per_token_head"},
        {"policy": "snapkv"},
        ["fp8_per_token_head keeps a scale beside each token"],
    ),
    ({"kv_cache_dtype": "nvfp4"}, {"policy": "twilight"}, ["nvfp4 packs two numbers into a"]),
    (
        {"kv_cache_dtype": "turboquant_4bit_nc"},
        {"policy": "streaming_llm"},
        ["turboquant_4bit_nc keeps codes of rotated keys, and no policy can read it"],
    ),
    (
        {"kv_cache_dtype": "fp8_inc"},
        {"policy": "quest"},
        ["fp8_inc is laid out for a kernel that kvplug does not plan"],
    ),
    (
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
        {"policy": "quest"},
        ["the layers that --kv-cache-dtype-skip-layers names", "drop it, or"],
    ),
    ({"enable_prompt_embeds": True}, {"policy": "quest"}, ["prompt embeddings"]),
    (
        {"disable_hybrid_kv_cache_manager": True},
        {"policy": "pyramid(snapkv)"},
        ["layers different budgets", "drop --disable-hybrid-kv-cache-manager"],
    ),
    (
        {"disable_hybrid_kv_cache_manager": True},
        {"policy": LOCAL},
        ["needs the hybrid KV cache manager", "drop --disable-hybrid-kv-cache-manager"],
    ),
    (
        {"pipeline_parallel_size": 2},
        {"policy": LOCAL},
        ["a rank has some of the layers, and cannot count the model's"],
    ),
    (
        {"hf_overrides": {"num_kv_shared_layers": 1}},
        {"policy": LOCAL},
        ["read another layer's cache, which would miss what local", "use a policy that selects"],
    ),
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        {"policy": LOCAL},
        ["nor to keep them from engines of another policy", "drop --kv-transfer-config"],
    ),
    (
        {"kv_cache_dtype": "nvfp4"},
        {"policy": f"{LOCAL} + quest"},
        ["nvfp4 packs two numbers into a"],
    ),
    ({}, {"policy": LOCAL, "protect": 9}, ["no protected span before it; drop protect"]),
    (
        {"enable_prompt_embeds": True},
        {"policy": "dense", "allow": ["quest"]},
        ["prompt embeddings"],
    ),
    ({}, {"policy": "dense", "allow": ["pyramid"]}, ["groups of their own"]),
    ({}, {"policy": "dense", "allow": ["snapkv"]}, ['write {"max_budget": 1024}']),
    (
        {"enable_prefix_caching": False},
        {"policy": "kvzip"},
        ["keeps what it compiles in the prefix cache; drop --no-enable-prefix-caching"],
    ),
    (
        {"speculative_config": NGRAM},
        {"policy": "kvzip"},
        ["speculative decoding with kvzip", "never run with drafts; drop --speculative-config"],
    ),
    (
        {"enable_prefix_caching": False},
        {"policy": "blend"},
        ["finds chunks in the prefix cache; drop --no-enable-prefix-caching"],
    ),
    (
        {"speculative_config": NGRAM, "kv_offloading_size": 1},
        {"policy": "blend"},
        [
            "speculative decoding beside blend(links=8) was never run; drop --speculative-config",
            "a KV connector beside blend(links=8) was never run; drop --kv-transfer-config",
        ],
    ),
    (
        {"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}},
        {"policy": "blend"},
        ["blend(links=8) moves keys: the model's rotary embedding is scaled by 'dynamic'"],
    ),
    (
        {"hf_overrides": {"sliding_window": 128}},
        {"policy": "blend"},
        ["the model has layers that see a window, beside which blend(links=8) was never run"],
    ),
    ({"kv_cache_dtype": "fp8"}, {"policy": "blend"}, ["a quantised cache beside blend(links=8)"]),
    ({}, {"policy": "blend + quest"}, ["never run beside another policy", "write blend"]),
    ({}, {"policy": "blend", "allow": ["quest"]}, ["cannot share a server with other policies"]),
    ({"pipeline_parallel_size": 2}, {"policy": "quest"}, ["pipeline parallelism"]),
    (
        {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
        {"policy": "snapkv"},
        ["micro-batches split a step", "drop --enable-dbo and --ubatch-size"],
    ),
    (
        {"hf_overrides": {"attention_chunk_size": 128}},
        {"policy": "kvzip"},
        ["some of the model's see a window or a chunk", "use keydiff(budget=1024)"],
    ),
    (
        {
            "hf_overrides": {"attention_chunk_size": 128},
            "disable_hybrid_kv_cache_manager": True,
        },
        {"policy": "streaming_llm"},
        ["beside the model's own windowed layers", "drop --disable-hybrid-kv-cache-manager"],
    ),
    (
        {"hf_overrides": {"num_kv_shared_layers": 1}},
        {"policy": "snapkv"},
        ["read another layer's cache, and snapkv scores by the queries", "use keydiff"],
    ),
    (
        {"hf_overrides": {"num_kv_shared_layers": 1}},
        {"policy": "pyramid(knorm(budget=256))"},
        ["read another layer's cache", "give them one budget"],
    ),
    (
        {"hf_overrides": {"num_kv_shared_layers": 1}, "kv_sharing_fast_prefill": True},
        {"policy": "quest"},
        ["--kv-sharing-fast-prefill hides most of a prompt", "drop it"],
    ),
    (
        {"runner": "pooling"},
        {"policy": "snapkv"},
        ["a pooling model decodes nothing", "without --attention-backend kvplug"],
    ),
]


def on_host(**extra):
    named = {"spec_name": "HostPages", "spec_module_path": "kvplug_vllm.host"}
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    extra = {**named, "cpu_bytes_to_use": 1 << 30, **extra}
    return {"kv_transfer_config": {**config, "kv_connector_extra_config": extra}}


# (arguments, kvplug's settings, what the error must say)
REFUSED_ON_HOST = [
    (on_host(format="kivi(bits=3)"), "dense", ["bits must be 2, 4 or 8", '"plain" for pages as']),
    (on_host(format="quest"), "dense", ["the format of a page, got 'quest'", '"kivi(bits=8)"']),
    (on_host(format="kivi + quest"), "dense", ["the format of a page, got 'kivi + quest'"]),
    (on_host(format=8), "dense", ["a policy must be a line of text, got 8"]),
    (on_host(fromat="kivi"), "dense", ["no option 'fromat'; did you mean 'format'?"]),
    (
        on_host(canonical_layout=True),
        "dense",
        ["no option 'canonical_layout'; write, for example"],
    ),
    (on_host(cpu_bytes_to_use=None), "dense", ["must be a number of bytes, got None; write"]),
    (on_host(spec_name="HostPage"), "dense", ["the specification HostPages of", "'HostPage' of"]),
    (on_host(), {"policy": "dense", "allow": ["quest"]}, ["one's answer to another of another"]),
    (on_host(), "snapkv", ["leaves holes among them or packs them"]),
    (on_host(), "kivi(bits=4)", ["a KV connector beside kivi(bits=4) was never run"]),
    ({**on_host(), "block_size": 128}, "dense", ["pages of 32 or 64 tokens", '"format": "plain"']),
    ({**on_host(), "kv_cache_dtype": "fp8"}, "dense", ["never run beside a KV cache fp8; write"]),
    (
        {**on_host(), "speculative_config": NGRAM},
        "dense",
        ["never run beside speculative decoding"],
    ),
    (
        {**on_host(), "hf_overrides": {"num_kv_shared_layers": 1}},
        "dense",
        ["never run beside layers that share a cache"],
    ),
    ({**on_host(), "tensor_parallel_size": 2}, "dense", ["never run on several ranks; use one"]),
    (
        {**on_host(), "attention_backend": None},
        "dense",
        ["HostPages writes pages through kvplug's layers; add --attention-backend kvplug"],
    ),
]


def configure(model, kvplug, **arguments):
    """What every vLLM front end does before it starts anything."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        **{
            "model": str(model),
            "attention_backend": "kvplug",
            "additional_config": {"kvplug": kvplug},
            "max_model_len": 1024,
            "block_size": 32,
            **arguments,
        }
    ).create_engine_config()


@pytest.mark.parametrize("arguments, kvplug, parts", REFUSED, ids=lambda value: str(value)[:60])
def test_refused_with_what_to_do_instead(random_llama, arguments, kvplug, parts):
    with pytest.raises(ValueError, match="kvplug") as caught:
        configure(random_llama(), kvplug, **arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "arguments, kvplug, parts", REFUSED_ON_HOST, ids=lambda value: str(value)[-60:]
)
def test_host_memory_is_refused_with_what_to_do_instead(random_llama, arguments, kvplug, parts):
    settings = {"policy": kvplug} if isinstance(kvplug, str) else kvplug
    with pytest.raises(ValueError, match="kvplug") as caught:
        configure(random_llama(), settings, **arguments)
    for part in parts:
        assert part in str(caught.value)


def test_host_memory_is_served_plain_where_a_format_was_never_run(random_llama):
    for options in ({"block_size": 128}, {"kv_cache_dtype": "fp8"}):
        configure(random_llama(), {"policy": "dense"}, **on_host(format="plain"), **options)
    config = configure(random_llama(), {"policy": "quest"}, **on_host())
    assert config.kv_transfer_config.kv_connector_extra_config["kvplug_heads"] == [2, 64]


def test_a_file_of_another_model_s_heads_is_refused(random_llama, tmp_path):
    line = heads.line(tmp_path)
    configure(random_llama(), {"policy": line})
    wanted = r"made for tiny \(llama, 2 layers, 4 heads of 64.* is another \(llama, 2 layers, 6 "
    with pytest.raises(ValueError, match=wanted):
        configure(random_llama(heads=6), {"policy": line})
    with pytest.raises(ValueError, match=r"cannot read the file of heads 'none': No such file"):
        configure(random_llama(), {"policy": "minference(heads='none')"})


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"kv_cache_dtype": "fp8"}, "beside duo was never run; drop --kv-cache-dtype, or"),
        ({"speculative_config": NGRAM}, "speculative decoding beside duo was never run"),
        ({"tensor_parallel_size": 2}, "gives each rank some heads of a layer"),
    ],
    ids=str,
)
def test_heads_of_two_kinds_are_refused_what_they_were_never_run_with(
    random_llama, tmp_path, arguments, reason
):
    heads.made({0: [heads.A] * 4}).save(file := tmp_path / "heads.json")
    line = f"duo(keydiff(budget=512), heads={str(file)!r})"
    configure(random_llama(), {"policy": line})
    with pytest.raises(ValueError, match="use keydiff") as caught:
        configure(random_llama(), {"policy": line}, **arguments)
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match="is another"):
        configure(random_llama(heads=6), {"policy": line})
    with pytest.raises(ValueError, match="cannot read the file of heads 'none'"):
        configure(random_llama(), {"policy": "duo(keydiff, heads='none')"})


@pytest.mark.parametrize("arguments", [{"kv_cache_dtype": "fp8"}, {"enable_prompt_embeds": True}])
def test_local_layers_alone_take_what_only_a_plan_could_not(random_llama, arguments):
    configure(random_llama(), {"policy": LOCAL}, **arguments)


def test_the_same_options_pass_without_a_policy(random_llama):
    speculative = {"method": "ngram_gpu", "num_speculative_tokens": 2}
    configure(random_llama(), {"policy": "dense"}, speculative_config=speculative)


def drafting(method, model):
    return {"method": method, "model": str(model), "num_speculative_tokens": 2}


def test_drafters_that_were_never_run_are_refused(random_llama):
    eagle3 = drafting("eagle3", random_llama())
    configure(random_llama(), {"policy": "dense"}, speculative_config=eagle3)
    with pytest.raises(ValueError, match=r"by 'eagle3' with snapkv.* was never seen") as caught:
        configure(random_llama(), {"policy": "snapkv"}, speculative_config=eagle3)
    assert '{"method": "draft_model", "model": "…", "num_' in str(caught.value)


@pytest.mark.parametrize("policy", ["pyramid(snapkv)", LOCAL])
def test_model_runner_v1_is_refused_drafters_that_it_would_split(random_llama, policy):
    """What its groups of a few layers are for, a drafter of one layer fits into."""
    for layers, method in ((1, "draft_model"), (2, "draft_model"), (2, "eagle")):
        drafts = drafting(method, random_llama(layers=layers))
        if layers == 1:
            config = configure(random_llama(), {"policy": policy}, speculative_config=drafts)
            assert not config.use_v2_model_runner
        else:
            with pytest.raises(ValueError, match="the drafter has 2, which Model Runner V1 wants"):
                configure(random_llama(), {"policy": policy}, speculative_config=drafts)


def test_a_drafter_beside_what_is_let_go_of_needs_groups(random_llama):
    options = {
        "speculative_config": drafting("draft_model", random_llama()),
        "disable_hybrid_kv_cache_manager": True,
    }
    configure(random_llama(), {"policy": "quest"}, **options)
    for kvplug in (
        {"policy": "snapkv"},
        {"policy": "streaming_llm"},
        {"policy": "dense", "allow": ["quest"]},
    ):
        with pytest.raises(ValueError, match="a drafter keeps what the model's layers let go of"):
            configure(random_llama(), kvplug, **options)


def test_drafts_are_refused_beside_recurrent_layers(tmp_path):
    from kvplug_evals.models.random_hybrid import build_random_granite4

    build_random_granite4(tmp_path)
    options = {"speculative_config": NGRAM, "skip_tokenizer_init": True, "block_size": None}
    configure(tmp_path, {"policy": "dense"}, **options)
    with pytest.raises(ValueError, match="recurrent layers, whose states rejected drafts change"):
        configure(tmp_path, {"policy": "quest"}, **options)


def test_compiling_is_refused_where_a_request_has_other_states_too(tmp_path):
    from kvplug_evals.models.random_hybrid import build_random_granite4

    build_random_granite4(tmp_path)
    with pytest.raises(ValueError, match=r"recurrent layers, whose states behind a compiled"):
        configure(tmp_path, {"policy": "kvzip"}, skip_tokenizer_init=True, block_size=None)


def test_compiling_on_several_ranks_needs_a_runner_that_tells_them(random_llama):
    config = configure(random_llama(), {"policy": "kvzip"})
    assert list(refusals(config)) == []
    config.parallel_config.world_size = 2
    reasons = [reason for reason in refusals(config) if "on several ranks" in reason]
    assert len(reasons) == (not config.use_v2_model_runner)


def test_drafts_are_refused_where_a_step_does_not_wait_for_the_last_one(random_llama):
    """On a CPU vLLM always waits."""
    config = configure(random_llama(), {"policy": "quest"}, speculative_config=NGRAM)
    assert list(refusals(config)) == []
    config.scheduler_config.async_scheduling = True
    (reason,) = refusals(config)
    assert "add --no-async-scheduling" in reason


def test_caches_of_eight_bits_are_refused_what_their_kernels_do_not_have(
    random_llama, monkeypatch
):
    from types import SimpleNamespace

    from vllm.platforms import current_platform

    config = configure(random_llama(), {"policy": "quest"}, kv_cache_dtype="fp8_e5m2")
    assert list(refusals(config)) == []
    with monkeypatch.context() as patch:
        patch.setattr(type(current_platform), "is_cuda", lambda self: True)
        (reason,) = refusals(config)
        assert "reads no KV cache fp8_e5m2; use --kv-cache-dtype fp8_e4m3" in reason
    config.quant_config = SimpleNamespace(kv_cache_scheme={"strategy": "attn_head"})
    (reason,) = refusals(config)
    assert "scales of the KV cache fp8_e5m2 for each head" in reason


def test_a_request_is_refused_what_a_server_with_drafts_cannot_serve(random_llama):
    offer = {"policy": "dense", "allow": ["quest"]}
    config = configure(random_llama(), offer, speculative_config=NGRAM)
    assert str(settings_for(config, "quest(budget=64)").policy).startswith("quest(budget=64")
    with pytest.raises(Refused, match="leave top_p out") as caught:
        settings_for(config, "quest(budget=64, top_p=0.9)")
    assert caught.value.reason == "drafts"
    settings_for(configure(random_llama(), offer), "quest(budget=64, top_p=0.9)")


@pytest.mark.parametrize(
    "arguments, variable, parts",
    [
        (
            {"attention_backend": None, "additional_config": {"kvplug": {"policy": "nonsense"}}},
            "",
            ["'kvplug' of --additional-config: needs --attention-backend kvplug"],
        ),
        ({"attention_backend": None}, "nonsense", ["KVPLUG_POLICY=nonsense: needs --att"]),
        (
            {"additional_config": {"kvplug": {"policy": "dense"}, "KVplug": {}, "allow": []}},
            "",
            ["'KVplug', 'allow' of --additional-config: only what is under 'kvplug' is read"],
        ),
        ({"attention_backend": None, "additional_config": {"policy": "another's"}}, "", []),
        ({"additional_config": {}}, "quest", []),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_has_no_effect_is_said_and_breaks_nobody(
    random_llama, monkeypatch, arguments, variable, parts
):
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("vllm.kvplug")
    vllm_logger._print_warning_once.cache_clear()  # another test may have been told
    monkeypatch.setenv("KVPLUG_POLICY", variable)
    logger.addHandler(handler)
    try:
        configure(random_llama(), {}, **{"additional_config": {}, **arguments})
    finally:
        logger.removeHandler(handler)
    assert len(said) == len(parts), said
    for line, part in zip(said, parts, strict=True):
        assert line.startswith("kvplug: without effect: ")
        assert part in line


@pytest.mark.parametrize(
    "given, variable, wanted",
    [
        (
            {},
            "",
            {"policy": "twilight(budget=0.0625, bits=2, dense_layers=2)", "min_context": 8192},
        ),
        ({"protect": 4}, "dense", {"policy": "dense", "min_context": 0, "protect": 4}),
        ({"policy": "dense", "min_context": 7}, "quest", {"policy": "dense", "min_context": 7}),
    ],
)
def test_an_engine_keeps_what_stood_in_for_its_policy_at_its_start(
    random_llama, monkeypatch, given, variable, wanted
):
    from kvplug_vllm.settings import offer_of

    monkeypatch.setenv("KVPLUG_POLICY", variable)
    config = configure(random_llama(), given)
    assert config.additional_config == {"kvplug": wanted}
    monkeypatch.setenv("KVPLUG_POLICY", "nonsense")
    assert str(offer_of(config).settings.policy) == wanted["policy"]


def test_mla_is_refused(tmp_path):
    from transformers import DeepseekV2Config

    DeepseekV2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        intermediate_size=64,
        architectures=["DeepseekV2ForCausalLM"],
    ).save_pretrained(tmp_path)
    for policy in ("dense", "quest"):
        with pytest.raises(ValueError, match="MLA"):
            configure(tmp_path, {"policy": policy}, skip_tokenizer_init=True)


@pytest.mark.engine
@pytest.mark.cpu
@pytest.mark.parametrize("environment", [{}, {"VLLM_TARGET_DEVICE": "cpu"}])
def test_a_server_with_a_wrong_policy_does_not_start(random_llama, environment):
    """Also where VLLM_TARGET_DEVICE bypasses platform plugins, ours with them."""
    done = subprocess.run(
        [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(random_llama()),
            "--attention-backend", "kvplug", "--enforce-eager", "--block-size", "32",
            "--max-model-len", "1024", "--skip-tokenizer-init", "--port", "0",
            "--kv-cache-memory-bytes", str(64 << 20),
            "--additional-config", json.dumps({"kvplug": {"policy": "quest(budgt=7)"}}),
        ],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode != 0
    assert "quest has no option 'budgt'. Did you mean 'budget'?" in done.stdout + done.stderr


@pytest.mark.parametrize("hybrid, reasons", [(True, 0), (False, 1)])
def test_blocks_are_held_against_pages_once_those_are_known(hybrid, reasons):
    """A model with recurrent layers gets larger ones behind the refusals; the plan asks again."""
    from kvplug import Planner, Settings, parse
    from kvplug_vllm.refusals import beside

    config = SimpleNamespace(
        model_config=SimpleNamespace(is_hybrid=hybrid, hf_text_config=None),
        cache_config=SimpleNamespace(block_size=128),
        speculative_config=None,
    )
    settings = Settings(policy=parse("xattention(block=160)"))
    assert len(list(beside(settings, config))) == reasons
    with pytest.raises(ValueError, match=r"write xattention\(block=256\)"):
        Planner(settings, 256)
