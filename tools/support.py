"""docs/support.md: what each engine serves under each policy, and what it refuses and why.

    python tools/support.py vllm        # in the environment of vLLM: writes its part
    PYTHONPATH=tests/sglang/shims SGLANG_USE_CPU_ENGINE=1 python tools/support.py sglang

A cell is asked of the adapter's own refusals, for arguments as a user gives them. It is *tested*
where a test runs it through the engine; tests/vllm/test_support.py and its sibling in tests/sglang
fail where the page is stale or a test that it names is gone.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from kvplug import read_offer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/support.md"
INTRODUCTION = """# What is served

**tested**: a test runs it through the engine on a CPU (vLLM also over Model Runner V2 with
replayed graphs, see docs/compatibility.md); served: not refused, and no test of its own; a
number: refused at start, with the reason below. `snapkv` stands for what scores tokens by
queries, `keydiff` by keys and values (`knorm`, `random`, `vase`, `lagkv`, `cur` too), *chunk* and
*share* for `keydiff` with a `chunk`, of which it keeps a number of tokens or a share, `a_shape`
and `xattention` for what reads prompts by position and by an estimate, *compiled* for `kvzip`,
`kivi` for pages in a format (in vLLM with `--block-size 32`), `host` for `host + quest`, *chosen*
for a server whose requests choose (`allow`). `duo`, whose file is one model's, is in no column: in
both engines tests run it on full attention, with the prefix cache, preempted or retracted, aborted
and replayed from graphs, and `docs/limits.md` says what it is refused beside. Of beam search a
number is the answer to the request that asks for it.
Nothing here has run on a GPU unless `kvplug doctor` says so. Written by `tools/support.py`.
"""
POLICIES: Mapping[str, dict[str, Any]] = {
    "dense": {"policy": "dense"},
    "twilight": {"policy": "twilight"},
    "quest": {"policy": "quest"},
    "streaming_llm": {"policy": "streaming_llm"},
    "snapkv": {"policy": "snapkv"},
    "keydiff": {"policy": "keydiff"},
    "pyramid": {"policy": "pyramid(snapkv)"},
    "chunk": {"policy": "keydiff(chunk=512)"},
    "share": {"policy": "keydiff(budget=0.25, chunk=512)"},
    "compiled": {"policy": "kvzip"},
    "a_shape": {"policy": "a_shape"},
    "xattention": {"policy": "xattention"},
    "local": {"policy": 'local(layers="1::2")'},
    "kivi": {"policy": "kivi(bits=4)"},
    "blend": {"policy": "blend"},
    "host": {"policy": "host(pages=64) + quest(budget=1024, dense_layers=0)"},
    "chosen": {"policy": "dense", "allow": ["quest", "snapkv"], "max_budget": 1024},
}


@dataclass(frozen=True)
class Row:
    what: str
    model: str = "llama"
    """Whose builder is ``build_random_…``, or a configuration of ``CONFIGS``."""
    options: dict[str, Any] = field(default_factory=dict)
    drafts: str = ""
    """The method of speculative decoding by the model itself."""
    tests: dict[str, str] = field(default_factory=dict)
    """A test -> the policies that it runs."""
    beams: bool = False
    """A request for beam search, not a server."""
    ours: bool = False
    """An option of kvplug's, which wants it selected."""
    wraps: str | None = None
    """SGLang's attention that kvplug wraps, where not that of a CPU."""


MODULES = {
    "llama": "random_llama", "gemma3": "random_llama", "granite4": "random_hybrid",
    "gemma4": "random_shared", "gemma3n": "random_shared", "gpt_oss": "random_gpt_oss",
    "llama4": "random_chunked", "qwen2_audio": "random_audio",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 128,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "DeepseekV2": {
        "moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": None,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
}  # fmt: skip
HOST = {
    "kv_transfer_config": {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "HostPages", "spec_module_path": "kvplug_vllm.host",
            "cpu_bytes_to_use": 1 << 30,
        },
    },
}  # fmt: skip
VLLM = {
    "Models": [
        Row("full attention, any group, in chunks and ragged batches (Llama, Qwen 3, …)", tests={
            "vllm/test_full_budget.py::test_full_budget_equals_stock": "dense twilight quest "
            "streaming_llm",
            "vllm/test_eviction.py::test_full_budget_equals_stock": "snapkv keydiff pyramid",
            "vllm/test_local.py::"
            "test_local_layers_are_those_of_a_configuration_token_for_token": "local",
            "vllm/test_chunks.py::"
            "test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions": "chunk",
            "vllm/test_chunks.py::"
            "test_chunks_packed_where_they_lie_are_those_of_a_plain_llama": "share",
            "vllm/test_compiled_contexts.py::"
            "test_whoever_comes_with_a_compiled_context_sees_what_was_kept_of_it": "compiled",
            "vllm/test_prefill.py::test_a_prompt_by_position_is_a_plain_llama_s": "a_shape",
            "vllm/test_prefill.py::test_blocks_read_what_was_chosen_and_nothing_else":
            "xattention",
            "vllm/test_coded.py::test_ragged_chunks_found_again_and_aborted": "kivi",
            "vllm/test_blended.py::test_chunks_in_any_order_answer_by_the_definition": "blend",
            "vllm/test_placed.py::test_answers_are_the_selectors_own": "host",
            "vllm/test_requests.py::test_a_batch_of_policies_answers_as_each_alone": "chosen",
        }),
        Row("windows between (Gemma 2 and 3)", "gemma3", tests={
            "vllm/test_models.py::test_small_budgets_beside_windowed_layers_answer_as_alone":
            "quest streaming_llm snapkv pyramid",
        }),
        Row("recurrent layers (Granite 4, Falcon-H1, Qwen3-Next)", "granite4", tests={
            "vllm/test_architectures.py::"
            "test_policies_answer_as_stock_at_full_budget_and_in_a_batch_as_alone":
            "twilight quest streaming_llm keydiff",
        }),
        Row("layers that share a cache (Gemma 3n and 4)", "gemma4", tests={
            "vllm/test_architectures.py::"
            "test_policies_answer_as_stock_at_full_budget_and_in_a_batch_as_alone":
            "twilight quest streaming_llm keydiff",
        }),
        Row("attention sinks (gpt-oss)", "gpt_oss", tests={
            "vllm/test_architectures.py::"
            "test_policies_answer_as_stock_at_full_budget_and_in_a_batch_as_alone":
            "twilight quest streaming_llm keydiff",
        }),
        Row("attention in chunks between (Llama 4)", "llama4", tests={
            "vllm/test_architectures.py::"
            "test_policies_answer_as_stock_at_full_budget_and_in_a_batch_as_alone":
            "twilight quest streaming_llm keydiff",
        }),
        Row("audio between tokens, positions of one dimension (Qwen2-Audio; M-RoPE was never run)",
            "qwen2_audio", options={"skip_tokenizer_init": False}, tests={
            "vllm/test_audio.py::test_full_budget_equals_stock":
            "twilight quest streaming_llm snapkv keydiff",
            "vllm/test_audio.py::test_small_budgets_answer_in_a_batch_as_alone": "chosen",
        }),
        Row("latent attention (DeepSeek)", "DeepseekV2"),
        Row("pooling", options={"runner": "pooling"}),
    ],
    "Settings": [
        Row("prefix cache, preemption", tests={
            "vllm/test_lifecycle.py::test_preempted_requests_answer_as_alone":
            "quest twilight streaming_llm keydiff",
            "vllm/test_chunks.py::test_preempted_requests_are_packed_again_as_before": "chunk",
            "vllm/test_prefill.py::test_chunks_and_preemption_change_no_token": "a_shape",
            "vllm/test_prefill.py::"
            "test_blocks_are_chosen_for_alike_in_chunks_a_batch_and_after_a_preemption":
            "xattention",
            "vllm/test_chunks.py::test_a_shared_context_costs_its_packed_size_once": "share",
            "vllm/test_coded.py::test_preempted_and_resumed": "kivi",
            "vllm/test_blended.py::"
            "test_preempted_aborted_and_evicted_requests_lie_as_they_then_can": "blend",
            "vllm/test_placed.py::test_preempted_requests_answer_as_before": "host",
            "vllm/test_requests.py::test_preempted_requests_keep_their_policies": "chosen",
            "vllm/test_local.py::"
            "test_local_layers_are_those_of_a_configuration_token_for_token": "local",
        }),
        Row("CUDA graphs (recorded on a CPU)", tests={
            "vllm/test_twin.py::test_replayed_steps_answer_as_eager_ones":
            "dense quest twilight snapkv streaming_llm keydiff pyramid",
            "vllm/test_coded.py::test_ragged_chunks_found_again_and_aborted": "kivi",
            "vllm/test_blended.py::test_chunks_in_any_order_answer_by_the_definition": "blend",
            "vllm/test_placed.py::test_answers_are_the_selectors_own": "host",
            "vllm/test_chunks.py::"
            "test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions": "chunk",
            "vllm/test_chunks.py::"
            "test_chunks_packed_where_they_lie_are_those_of_a_plain_llama": "share",
            "vllm/test_local.py::"
            "test_local_layers_are_those_of_a_configuration_token_for_token": "local",
        }),
        Row("tensor parallelism", options={"tensor_parallel_size": 2}, tests={
            "vllm/test_models.py::test_two_ranks_answer_as_one": "quest snapkv local kivi",
            "vllm/test_blended.py::"
            "test_two_ranks_of_their_own_processes_hear_how_a_request_lies": "blend",
        }),
        Row("pipeline parallelism", options={"pipeline_parallel_size": 2}),
        Row("micro-batches", options={"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}),
        Row("`--kv-cache-dtype fp8`, `fp8_e4m3`", options={"kv_cache_dtype": "fp8"}, tests={
            "vllm/test_eight_bits.py::test_full_budget_equals_stock":
            "twilight quest streaming_llm snapkv keydiff pyramid",
            "vllm/test_local.py::"
            "test_local_layers_have_fp8_caches_as_those_of_a_configuration": "local",
        }),
        Row("`fp8_e5m2` (CPUs alone)", options={"kv_cache_dtype": "fp8_e5m2"}, tests={
            "vllm/test_eight_bits.py::test_full_budget_equals_stock":
            "twilight quest streaming_llm snapkv keydiff pyramid",
        }),
        Row("`int8_per_token_head`", options={"kv_cache_dtype": "int8_per_token_head"}),
        Row("`nvfp4`", options={"kv_cache_dtype": "nvfp4"}),
        Row("`turboquant_4bit_nc`", options={"kv_cache_dtype": "turboquant_4bit_nc"}),
        Row("`--kv-offloading-size`", options={"kv_offloading_size": 1}, tests={
            "vllm/test_offloading.py::test_a_prefix_from_host_memory_is_chosen_from_as_it_was":
            "quest twilight",
            "vllm/test_local.py::"
            "test_local_layers_beside_drafts_and_host_memory_answer_as_without": "local",
        }),
        Row("pages on the host in a format (`HostPages`)", options=HOST, ours=True, tests={
            "vllm/test_host.py::"
            "test_a_prefix_that_was_pushed_out_of_the_pool_comes_back_as_the_format_has_it":
            "dense quest twilight",
        }),
        Row("other KV connectors", options={
            "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        }),
        Row("n-gram drafts", options={
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
        }, tests={
            "vllm/test_drafts.py::test_drafts_change_no_answer":
            "twilight quest streaming_llm snapkv keydiff pyramid",
            "vllm/test_local.py::"
            "test_local_layers_beside_drafts_and_host_memory_answer_as_without": "local",
        }),
        Row("drafts by a model", drafts="draft_model", tests={
            "vllm/test_drafts.py::test_drafts_change_no_answer":
            "twilight quest streaming_llm snapkv keydiff",
        }),
        Row("drafts by an EAGLE head", drafts="eagle", tests={
            "vllm/test_drafts.py::test_drafts_change_no_answer": "quest streaming_llm snapkv",
        }),
        Row("LoRA", options={"enable_lora": True}),
        Row("sleep mode (GPUs alone)", options={"enable_sleep_mode": True}),
        Row("beam search over 8,000 tokens", options={"max_model_len": 8192}, beams=True, tests={
            "vllm/test_admission.py::test_an_llms_beams_are_judged_by_what_is_done_to_them":
            "dense streaming_llm",
        }),
        Row("prompt embeddings", options={"enable_prompt_embeds": True}),
        Row("`--disable-hybrid-kv-cache-manager`", options={
            "disable_hybrid_kv_cache_manager": True,
        }),
    ],
}  # fmt: skip
SGLANG = {
    "Models": [
        Row("full attention, any group, in chunks and ragged batches (Llama, Qwen 3, …)", tests={
            "sglang/test_full_budget.py::test_full_budget_equals_stock":
            "dense twilight quest streaming_llm snapkv keydiff pyramid",
            "sglang/test_chunks.py::"
            "test_answers_are_those_of_a_plain_llama_that_packs_at_the_same_positions": "chunk",
            "sglang/test_prefill.py::test_a_prompt_by_position_is_a_plain_llama_s": "a_shape",
            "sglang/test_prefill.py::test_blocks_read_what_vllm_s_do": "xattention",
            "sglang/test_requests.py::test_mixed_requests_answer_as_alone": "chosen",
            "sglang/test_coded.py::test_ragged_chunks_found_again": "kivi",
            "sglang/test_blended.py::test_chunks_in_any_order_answer_by_the_definition": "blend",
        }),
        Row("windows between (Gemma 2 and 3)", "gemma3", tests={
            "sglang/test_windows.py::test_the_long_way_round_with_full_budget_equals_stock":
            "quest twilight streaming_llm keydiff",
            "sglang/test_windows.py::test_policies_of_their_own_in_a_batch_answer_as_alone":
            "chosen",
        }),
        Row("recurrent layers (Granite 4, Falcon-H1, Qwen3-Next)", "granite4", options={
            "disable_radix_cache": True,  # whose states a CPU has in pages of one token alone
        }, tests={
            "sglang/test_hybrids.py::"
            "test_full_budget_equals_stock_token_for_token_and_state_for_state":
            "quest twilight snapkv keydiff streaming_llm",
            "sglang/test_hybrids.py::"
            "test_a_small_pool_of_requests_that_end_come_back_and_share_prompts": "chunk chosen",
        }),
        Row("layers that share a cache (Gemma 3n)", "gemma3n", wraps="fa3", tests={
            "sglang/test_architectures.py::"
            "test_a_policy_is_stock_at_full_budget_and_its_definition_below":
            "quest keydiff streaming_llm",
        }),
        Row("attention sinks (gpt-oss, `--disable-hybrid-swa-memory`)", "gpt_oss", options={
            "disable_hybrid_swa_memory": True,
        }, wraps="fa3", tests={
            "sglang/test_architectures.py::"
            "test_a_policy_is_stock_at_full_budget_and_its_definition_below":
            "quest keydiff streaming_llm",
        }),
        Row("attention in chunks between (Llama 4)", "llama4", wraps="fa3"),
        Row("latent attention (DeepSeek)", "DeepseekV2"),
        Row("pooling", options={"is_embedding": True}),
    ],
    "Settings": [
        Row("prefix cache", tests={
            "sglang/test_eviction.py::"
            "test_the_next_turn_hits_the_whole_prompt_and_answers_as_if_fresh": "snapkv keydiff",
            "sglang/test_coded.py::test_ragged_chunks_found_again": "kivi",
            "sglang/test_blended.py::test_chunks_in_any_order_answer_by_the_definition": "blend",
        }),
        Row("retraction", tests={
            "sglang/test_eviction.py::"
            "test_a_retracted_request_is_compressed_again_and_goes_on_as_it_was":
            "snapkv keydiff quest",
            "sglang/test_chunks.py::"
            "test_requests_retracted_and_chosen_apart_are_packed_as_before": "chunk",
            "sglang/test_coded.py::test_retracted_and_aborted": "kivi",
            "sglang/test_blended.py::"
            "test_retracted_aborted_and_evicted_requests_lie_as_they_then_can": "blend",
        }),
        Row("CUDA graphs (recorded on a CPU)", tests={
            "sglang/test_replay.py::test_replayed_steps_answer_as_eager_ones":
            "quest twilight snapkv streaming_llm xattention kivi blend",
        }),
        Row("tensor parallelism", options={"tp_size": 2}, tests={
            "sglang/test_full_budget.py::test_two_ranks_equal_stock": "quest snapkv",
            "sglang/test_server.py::test_tensor_parallel_mixed_policies_answer_as_alone": "chosen",
        }),
        Row("pipeline parallelism", options={"pp_size": 2}),
        Row("data-parallel attention", options={
            "enable_dp_attention": True, "dp_size": 2, "tp_size": 2,
        }),
        Row("prefill and decode apart", options={"disaggregation_mode": "prefill"}),
        Row("`--kv-cache-dtype fp8_e4m3` (FlashAttention 3)", options={
            "kv_cache_dtype": "fp8_e4m3",
        }, wraps="fa3", tests={
            "sglang/test_eight_bits.py::test_full_budget_equals_stock":
            "twilight quest streaming_llm snapkv keydiff pyramid",
        }),
        Row("`fp8_e4m3` (Triton)", options={"kv_cache_dtype": "fp8_e4m3"}, wraps="triton"),
        Row("`fp8_e4m3` (CPUs)", options={"kv_cache_dtype": "fp8_e4m3"}),
        Row("HiCache", options={"enable_hierarchical_cache": True}),
        Row("LMCache", options={"enable_lmcache": True}),
        Row("n-gram drafts", options={"speculative_algorithm": "NGRAM"}),
        Row("sessions", options={"enable_streaming_session": True}),
        Row("two-batch overlap", options={"enable_two_batch_overlap": True}),
    ],
}  # fmt: skip
TABLES = {"vllm": VLLM, "sglang": SGLANG}


def build(name: str, folder: Path) -> Path:
    """A tiny model of random weights, or where nothing loads them its configuration."""
    if folder.exists():
        return folder
    if name in CONFIGS:
        import transformers

        own = {**SMALL, **CONFIGS[name], "architectures": [f"{name}ForCausalLM"]}
        getattr(transformers, f"{name}Config")(**own).save_pretrained(folder)
    else:
        module = import_module(f"kvplug_evals.models.{MODULES[name]}")
        getattr(module, f"build_random_{name}")(folder)
    return folder


def refused_by_vllm(model: Path, row: Row) -> list[list[str]]:
    """The reasons, for each of POLICIES."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.sampling_params import BeamSearchParams

    from kvplug_vllm.admission import refuse_beams
    from kvplug_vllm.refusals import refusals

    given: dict[str, Any] = {"max_model_len": 1024, "skip_tokenizer_init": True}
    given["block_size"] = 32  # a format codes no blocks of 128, which a CPU has unless told
    if row.drafts:
        given["speculative_config"] = {
            "method": row.drafts, "model": str(model), "num_speculative_tokens": 2,
        }  # fmt: skip
    if row.beams or row.ours:
        given["attention_backend"] = "kvplug"
        given["additional_config"] = {"kvplug": {"policy": "dense"}}
    platform = type(current_platform)
    with mock.patch.object(platform, "is_sleep_mode_available", return_value=True):
        config = EngineArgs(model=str(model), **{**given, **row.options}).create_engine_config()
    found = []
    for policy in POLICIES.values():
        config.additional_config = {"kvplug": policy}
        reasons = list(refusals(config))
        if row.beams:
            try:
                refuse_beams(config, BeamSearchParams(2, 4), [[1] * 8000])
            except ValueError as error:
                reasons.append(str(error))
        found.append(reasons)
    return found


def refused_by_sglang(model: Path, row: Row) -> list[list[str]]:
    """The reasons, for each of POLICIES."""
    from sglang.srt.plugins import load_plugins

    from kvplug_sglang import backend

    load_plugins()
    stock = backend.stock
    if (wraps := row.wraps) is not None:
        backend.stock = lambda server_args, device: wraps
    try:
        return [_refused(model, policy, row.options) for policy in POLICIES.values()]
    finally:
        backend.stock = stock


def _refused(model: Path, policy: dict[str, Any], options: dict[str, Any]) -> list[str]:
    from sglang.srt.server_args import ServerArgs

    os.environ["KVPLUG_POLICY"] = json.dumps(policy)
    server = ServerArgs(model_path=str(model), device="cpu", attention_backend="kvplug", **options)
    try:
        server.resolve_once()
    except (ValueError, AssertionError) as error:
        first, *reasons = str(error).split("\n- ")
        ours = first.startswith("kvplug")
        return reasons if ours else [f"SGLang itself: {first.splitlines()[0]}"]
    return []


REFUSED = {"vllm": refused_by_vllm, "sglang": refused_by_sglang}


def check_tests(engine: str) -> None:
    """Raises ValueError where a test that the page names is not there, or does not say the name
    of a policy that it is to run."""
    for row in (row for rows in TABLES[engine].values() for row in rows):
        for test, policies in row.tests.items():
            file, _, name = test.partition("::")
            text = (ROOT / "tests" / file).read_text()
            known = {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
            lost = [each for each in policies.split() if each not in text and each != "chosen"]
            if name not in known or lost:
                raise ValueError(f"{row.what}: {test} shows nothing of {lost or name}")


def part(engine: str) -> str:
    """The page's part of one engine."""
    lines = [f"## {'vLLM' if engine == 'vllm' else 'SGLang'}", ""]
    reasons: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for title, rows in TABLES[engine].items():
            lines += [f"| {title} | {' | '.join(POLICIES)} |", "|---" * (len(POLICIES) + 1) + "|"]
            for row in rows:
                shown = " ".join(row.tests.values()).split()
                refused = REFUSED[engine](build(row.model, Path(folder) / row.model), row)
                cells = []
                for policy, said in zip(POLICIES, refused, strict=True):
                    line = str(read_offer(POLICIES[policy], environ={}).settings.policy)
                    why = said if line == "dense" else [s.replace(line, "POLICY") for s in said]
                    reasons += [each for each in why if each not in reasons]
                    if why:
                        if policy in shown:
                            raise ValueError(f"{row.what}: {policy} is tested and refused: {why}")
                        cells.append(", ".join(str(reasons.index(each) + 1) for each in why))
                    else:
                        cells.append("**tested**" if policy in shown else "served")
                lines.append(f"| {row.what} | {' | '.join(cells)} |")
            lines.append("")
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


def written(engine: str) -> str:
    """That part as the page has it."""
    parts = PAGE.read_text().split("\n## ")[1:] if PAGE.exists() else []
    found = [f"## {each}" for each in parts if each.lower().startswith(engine)]
    return found[0].rstrip("\n") + "\n" if found else ""


def main(engine: str) -> None:
    check_tests(engine)
    parts = {each: part(each) if each == engine else written(each) for each in TABLES}
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([INTRODUCTION, *(text for text in parts.values() if text)]))


if __name__ == "__main__":
    main(sys.argv[1])
