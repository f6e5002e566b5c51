"""What ``kvplug_vllm`` leans on in vLLM without a promise. Each claim names what to look at."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import partial
from importlib.metadata import EntryPoint, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import kvplug_vllm

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VLLM = version("vllm")
MOVED = f"vLLM {VLLM} moved what kvplug leans on"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    """What a process finds that unpickles the backend's name before it has loaded plugins, and
    then imports our cache specs before anything has asked vLLM for its own."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    kvplug_vllm.register()
    code = """
import os, pickle
member = pickle.loads(bytes.fromhex(os.environ["PICKLED"]))["backend"]
import torch
from vllm.v1 import kv_cache_spec_registry
before = len(kv_cache_spec_registry._REGISTRY_KVCACHESPEC_LIST)
import kvplug_vllm.cache
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
shape = dict(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
manager = kv_cache_spec_registry.KVCacheSpecRegistry.get_manager_class
from vllm.v1.sample.logits_processor import build_logitsprocs
found = dict(
    rows_beside_drafts=str(hasattr(build_logitsprocs, "_kvplug")),
    name=member.name,
    path=member.get_path(),
    specs_before=str(before),
    full=manager(FullAttentionSpec(**shape)).__name__,
    windowed=manager(SlidingWindowSpec(**shape, sliding_window=8)).__name__,
)
with os.fdopen(int(os.environ["OUT"]), "wb") as out:
    pickle.dump(found, out)
"""
    pickled = pickle.dumps({"backend": AttentionBackendEnum["KVPLUG"]})
    reader, writer = os.pipe()
    python = subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[writer],
        env={**os.environ, "OUT": str(writer), "PICKLED": pickled.hex()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    os.close(writer)
    log, _ = python.communicate(timeout=120)
    with os.fdopen(reader, "rb") as out:
        written = out.read()
    assert python.returncode == 0, log.decode()
    return pickle.loads(written)


def source_of(module: str) -> ast.Module:
    """The source of a module that may not import on this machine."""
    spec = find_spec(module)
    assert spec is not None, f"{MOVED}: there is no module {module}"
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text())


def assigned_attributes(tree: ast.Module, class_name: str) -> set[str]:
    """Names set on ``self`` anywhere in a class."""
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    return {
        node.attr
        for node in ast.walk(found)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_the_installed_vllm_is_one_that_we_say_we_support():
    (wanted,) = PROJECT["optional-dependencies"]["vllm"]
    supported = Requirement(wanted).specifier
    assert str(supported) == "<0.34,>=0.32"
    assert supported.contains(Version(VLLM).base_version), (
        f"vLLM {VLLM} is outside {supported}: go through kvplug_vllm/compat.py, then widen "
        "pyproject.toml and this test"
    )


# The scheduler's side: cache.py.


def test_the_managers_hooks_have_the_parameters_that_ours_have():
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    from kvplug_vllm.streaming import EvictingManager

    for name in ("remove_skipped_blocks", "find_longest_cache_hit"):
        theirs = parameters(getattr(SingleTypeKVCacheManager, name))
        ours = parameters(getattr(EvictingManager, name))
        assert theirs == ours, f"{MOVED}: {name}{theirs}; see EvictingManager in cache.py"
    assert parameters(SingleTypeKVCacheManager._remove_blocks_in_range) == [
        "self",
        "request_id",
        "first_block",
        "last_block",
    ], f"{MOVED}: _remove_blocks_in_range; see EvictingManager.remove_skipped_blocks"
    needed = {"request_id", "num_tokens", "new_computed_blocks", "apply_admission_cap"}
    assert needed <= set(parameters(SingleTypeKVCacheManager.get_num_blocks_to_allocate)), (
        f"{MOVED}: get_num_blocks_to_allocate, which holds admissions to most_blocks"
    )
    assert "max_admission_blocks_per_request" in parameters(SingleTypeKVCacheManager.__init__), (
        f"{MOVED}: the admission cap; see EvictingManager.__init__"
    )


def test_blocks_are_hashed_at_the_size_that_a_lookup_asks_for():
    from vllm.v1.core.kv_cache_utils import resolve_block_hashes

    needed = {"supports_fine_grained_hash_lookup", "alignment_tokens"}
    assert needed <= set(parameters(resolve_block_hashes)), f"{MOVED}: resolve_block_hashes"


def test_the_spec_can_be_rebuilt_as_ours():
    import torch
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as

    from kvplug_vllm.settings import EvictionSettings
    from kvplug_vllm.streaming import EvictingSpec

    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    dropped = {f.name for f in fields(FullAttentionSpec)} - {f.name for f in fields(AttentionSpec)}
    assert dropped == {"sliding_window", "attention_chunk_size", "non_causal"}, (
        f"{MOVED}: FullAttentionSpec now has {sorted(dropped)}; see customize_spec in cache.py"
    )
    ours = replace_as(
        full,
        EvictingSpec,
        drop=dropped,
        settings=EvictionSettings(policy="streaming_llm", min_context=0, protect=()),
        in_flight=3,
    )
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert hash(pickle.loads(pickle.dumps(ours))) == hash(ours)
    assert ours.page_size_bytes == full.page_size_bytes


def test_vllms_own_specs_keep_their_managers_when_ours_comes_first(fresh):
    assert fresh["specs_before"] == "0"
    assert (fresh["full"], fresh["windowed"]) == (
        "FullAttentionManager",
        "SlidingWindowManager",
    ), f"{MOVED}: KVCacheSpecRegistry; see compat.ensure_builtin_specs"


def test_the_registry_still_registers_only_into_an_empty_list():
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    source = inspect.getsource(KVCacheSpecRegistry._ensure_registered)
    assert "if _REGISTRY_KVCACHESPEC_LIST:" in source, (
        f"vLLM {VLLM} tracks its own registration: delete compat.ensure_builtin_specs"
    )


def test_a_block_of_a_living_request_may_have_a_name_of_our_own():
    from vllm.v1.core.block_pool import BlockPool

    from kvplug_vllm import compat

    pool = BlockPool(num_gpu_blocks=4, enable_caching=True, hash_block_size=16)
    block, other = pool.get_new_blocks(2)
    compat.name_block(pool, b"n" * 32, 0, block, 32)
    found = f"{MOVED}: BlockPool; see compat.name_block"
    assert pool.get_cached_block(b"n" * 32, [0]) == [block], found
    assert pool.get_cached_block(b"n" * 32, [1]) is None, found
    pool.free_blocks([block, other])
    assert pool.get_cached_block(b"n" * 32, [0]) == [block], "kept until the pool needs it"
    pool.get_new_blocks(3)
    assert pool.get_cached_block(b"n" * 32, [0]) is None, found


def test_a_request_may_lie_in_another_order_under_names_to_match():
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from kvplug_vllm import compat

    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256)

    def request(tokens: list[int], salt: str | None = None) -> Request:
        said = SamplingParams(max_tokens=1)
        return Request("one", tokens, said, None, cache_salt=salt, block_hasher=hasher)

    found, tokens = f"{MOVED}: Request; see compat.reorder", list(range(40))
    moved = request(list(tokens), "user's")
    assert compat.names_alone(moved, tokens[:32]) == request(tokens[:32], "user's").block_hashes
    compat.reorder(moved, tokens[::-1], "ours", [])
    assert list(moved.all_token_ids) == moved.prompt_token_ids == tokens[::-1], found
    assert moved.block_hashes == request(tokens[::-1], "ours").block_hashes, found
    names = [b"n" * 32]
    compat.reorder(moved, tokens, "ours", names)
    assert len(moved.block_hashes) == 2, found
    assert moved.block_hashes[0] == b"n" * 32, found
    assert moved.block_hashes[1] != request(tokens, "ours").block_hashes[1], "it follows from that"


def test_requests_that_come_back_are_named_by_the_step_that_they_come_back_in(monkeypatch):
    from vllm.v1.core.sched.output import CachedRequestData
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker import gpu_model_runner

    from kvplug_vllm import compat

    found = f"{MOVED}: compat.tell_with_steps"
    assert "resumed_req_ids" in {field.name for field in fields(CachedRequestData)}, found
    assert "self.use_v2_model_runner" in inspect.getsource(Scheduler.__init__), found
    runner = gpu_model_runner.GPUModelRunner
    assert parameters(runner._update_states)[:2] == ["self", "scheduler_output"], found

    step = SimpleNamespace(scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"one", "two"}))
    said = SimpleNamespace(extra_args={"a": 1})
    scheduler = SimpleNamespace(
        use_v2_model_runner=False,
        requests={
            "one": SimpleNamespace(sampling_params=said, prompt_token_ids=[3, 2, 1]),
            "two": SimpleNamespace(sampling_params=None, prompt_token_ids=[1]),
        },
    )
    monkeypatch.setattr(Scheduler, "schedule", lambda self: step)
    heard = []
    monkeypatch.setattr(runner, "_update_states", lambda self, step: heard.append(step))
    compat.tell_with_steps()
    compat.hear_with_steps()
    assert Scheduler.schedule(scheduler).kvplug == {"one": ({"a": 1}, [3, 2, 1])}
    there = SimpleNamespace(sampling_params=SimpleNamespace(), prompt_token_ids=[1, 2, 3])
    runner._update_states(SimpleNamespace(requests={"one": there}), step)
    assert (there.sampling_params.extra_args, there.prompt_token_ids) == ({"a": 1}, [3, 2, 1])
    assert heard == [step]


# The name KVPLUG: __init__.py.


def test_a_backend_may_have_a_name_of_its_own():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    assert parameters(register_backend)[:2] == ["backend", "class_path"], f"{MOVED}: its registry"
    kvplug_vllm.register()
    member = AttentionBackendEnum["KVPLUG"]
    assert member.get_path() == "kvplug_vllm.backend.KVPlugBackend"


def test_registering_twice_changes_nothing_more():
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    kvplug_vllm.register()
    members = list(AttentionBackendEnum)
    choose = type(current_platform).get_attn_backend_cls.__func__
    kvplug_vllm.register()
    assert list(AttentionBackendEnum) == members
    assert type(current_platform).get_attn_backend_cls.__func__ is choose


def test_the_backends_name_unpickles_in_a_process_that_has_not_loaded_plugins(fresh):
    assert (fresh["name"], fresh["path"]) == ("KVPLUG", "kvplug_vllm.backend.KVPlugBackend")


def test_a_spawned_worker_shows_its_rows_beside_drafts(fresh):
    assert fresh["rows_beside_drafts"] == "True"


def test_the_backends_name_survives_copies_as_itself():
    import copy

    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    kvplug_vllm.register()
    member = AttentionBackendEnum["KVPLUG"]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.deepcopy({"backend": member})["backend"] is member
    stock = AttentionBackendEnum["CPU_ATTN"]
    assert pickle.loads(pickle.dumps(stock)) is stock


# Configurations, lookups and layers: compat.announce_*, compat.set_layer_class.


def test_every_configuration_is_announced_once_it_is_complete():
    from vllm.config import VllmConfig

    kvplug_vllm.register()
    kvplug_vllm.register()
    hook = VllmConfig.__post_init__
    assert hook._kvplug
    assert parameters(hook.__wrapped__) == ["self"], f"{MOVED}: compat.announce_configurations"
    assert not hasattr(hook.__wrapped__, "_kvplug"), "registered twice, hooked once"


def test_a_request_is_announced_before_its_prefix_is_looked_up(monkeypatch):
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    import kvplug_vllm.packing  # noqa: F401 -- hooks the manager
    from kvplug_vllm import compat

    hooked = KVCacheManager.get_computed_blocks
    assert parameters(hooked)[:2] == ["self", "request"], f"{MOVED}: compat.announce_lookups"
    assert hooked.__wrapped__.__qualname__ == "KVCacheManager.get_computed_blocks"
    order: list[object] = []
    manager = SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=("one",)))
    monkeypatch.setattr(
        KVCacheManager, "get_computed_blocks", lambda *given, **named: order.append((given, named))
    )
    compat.announce_lookups(lambda *told: order.append(told))
    KVCacheManager.get_computed_blocks(manager, "request", 64, more=1)  # 0.33 gives a length too
    assert order == [(("one",), "request"), ((manager, "request", 64), {"more": 1})]


def test_the_scheduler_looks_a_prefix_up_by_the_hooked_method():
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    import kvplug_vllm.packing  # noqa: F401 -- hooks the manager

    stock = inspect.signature(KVCacheManager.get_computed_blocks.__wrapped__)
    calls = [
        node
        for node in ast.walk(source_of("vllm.v1.core.sched.scheduler"))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get_computed_blocks"
    ]
    assert calls, f"{MOVED}: the scheduler looks prefixes up in another way"
    for call in calls:
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        given = stock.bind("self", *call.args, **named).arguments
        assert ast.unparse(given["request"]) == "request", f"{MOVED}: compat.announce_lookups"


def test_a_session_whose_turns_stream_in_says_so_by_keyword():
    from vllm.v1.engine.input_processor import InputProcessor

    assert "resumable" in parameters(InputProcessor.process_inputs), f"{MOVED}: sessions"
    calls = [
        node
        for node in ast.walk(source_of("vllm.v1.engine.async_llm"))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "process_inputs"
    ]
    assert any(k.arg == "resumable" for call in calls for k in call.keywords), (
        f"{MOVED}: AsyncLLM hands over a session's turn in another way"
    )


def test_vllm_asks_the_backend_that_a_layer_shows_for_its_spec():
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu import attn_utils

    from kvplug_vllm import compat

    for module in (gpu_model_runner, attn_utils):
        source = " ".join(inspect.getsource(module).split())
        asked = "customize_attention_spec( attn_module.get_attn_backend(), spec"
        assert asked in source.replace("spec(attn", "spec( attn"), (
            f"{MOVED}: {module.__name__}; see compat.set_layer_class"
        )
    backend = type("Backend", (), {"layer_class": 0})
    layer = SimpleNamespace(attn_backend=backend)
    compat.set_layer_class(layer, 0)
    assert layer.attn_backend is backend
    compat.set_layer_class(layer, 2)
    shown = Attention.get_attn_backend(layer)
    assert (shown.layer_class, backend.layer_class) == (2, 0)
    assert issubclass(shown, backend)


def test_a_layers_window_is_what_its_constructor_would_have_set():
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends import cpu_attn

    asked = " ".join(inspect.getsource(Attention.get_kv_cache_spec).split())
    assert "if self.sliding_window is not None" in asked, f"{MOVED}: compat.set_window"
    assert "return SlidingWindowSpec(" in asked, f"{MOVED}: compat.set_window"
    assert "self.sliding_window = sliding_window" in inspect.getsource(Attention.__init__)
    tokens = inspect.getsource(cpu_attn.CPUAttentionBackendImpl.__init__)
    assert "self.sliding_window = -1" in tokens, f"{MOVED}: windows of CPU_ATTN"
    assert "self.sliding_window = sliding_window" in tokens, f"{MOVED}: windows of CPU_ATTN"
    flash = ast.unparse(source_of("vllm.v1.attention.backends.flash_attn"))
    for form in ("(-1, -1)", "(sliding_window - 1, 0)"):
        assert f"self.sliding_window = {form}" in flash, f"{MOVED}: FlashAttention's windows"


# The platform: compat.honour_selection and platform.py.


def stock_cpu_platform():
    from vllm.platforms.cpu import CpuPlatform

    choose = CpuPlatform.__dict__["get_attn_backend_cls"]
    assert not hasattr(choose.__func__, "_kvplug"), (
        "the stock platform was patched, not subclassed"
    )
    return CpuPlatform


def selector_config():
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(
        head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=None
    )


def test_the_stock_cpu_platform_still_ignores_the_choice_of_a_backend():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    kvplug_vllm.register()
    chosen = stock_cpu_platform().get_attn_backend_cls(
        AttentionBackendEnum["KVPLUG"], selector_config()
    )
    assert "kvplug" not in chosen, (
        f"vLLM {VLLM} honours --attention-backend on the CPU: delete kvplug_vllm/cpu_platform.py, "
        "kvplug_vllm.platform() and its entry point, compat.honour_selection and select_backend"
    )


def test_our_platform_honours_it_and_is_the_stock_one_otherwise():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvplug_vllm.cpu_platform import KVPlugCpuPlatform

    kvplug_vllm.register()
    for backend in (None, AttentionBackendEnum["CPU_ATTN"]):
        assert KVPlugCpuPlatform.get_attn_backend_cls(
            backend, selector_config()
        ) == stock_cpu_platform().get_attn_backend_cls(backend, selector_config())
    assert parameters(KVPlugCpuPlatform.get_attn_backend_cls) == parameters(
        stock_cpu_platform().get_attn_backend_cls
    ), f"{MOVED}: get_attn_backend_cls; see compat.honour_selection and platform.py"


((_name, _value),) = PROJECT["entry-points"]["vllm.platform_plugins"].items()
PLATFORM = EntryPoint(_name, _value, "vllm.platform_plugins")


def entry_points_with(monkeypatch, *others: tuple[str, str]) -> None:
    import importlib.metadata

    found = [EntryPoint(*other, "") for other in (*others, (PLATFORM.name, PLATFORM.value))]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)


def test_the_entry_points_name_callables_also_after_the_platform_was_imported():
    import kvplug_vllm.cpu_platform  # noqa: F401

    for group in ("general_plugins", "platform_plugins", "logits_processors"):
        for name, value in PROJECT["entry-points"][f"vllm.{group}"].items():
            loaded = EntryPoint(name, value, "").load()
            assert callable(loaded), f"{value} is {loaded}: a submodule took the function's name"


def test_our_platform_is_active_on_the_cpu_alone(monkeypatch):
    import vllm.platforms

    entry_points_with(monkeypatch)
    assert PLATFORM.load()().endswith(".KVPlugCpuPlatform")
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: None)
    assert PLATFORM.load()() is None


def test_our_platform_makes_way_for_another_one(monkeypatch):
    entry_points_with(monkeypatch, ("ascend", "vllm_ascend:register"))
    assert PLATFORM.load()() is None


# The worker's side: attention.py, router.py, compat.py.


def test_the_steps_metadata_has_what_a_plan_reads_and_rewrites():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    used = {
        "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens",
        "max_query_len", "max_seq_len", "block_table_tensor", "slot_mapping", "positions",
        "is_prefilling", "seq_lens_cpu_upper_bound", "req_idx", "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
    }  # fmt: skip
    missing = used - {f.name for f in fields(CommonAttentionMetadata)}
    assert not missing, f"{MOVED}: CommonAttentionMetadata lacks {sorted(missing)}"


@pytest.mark.parametrize("req_idx, rows", [
    (None, [-1] * 3), (np.array([4, 0, 2, 9]), [4, 0, 2]), (np.array([4, 0]), [4, 0, -1])
])  # fmt: skip
def test_rows_are_slots_where_the_runner_names_them(req_idx, rows):
    from kvplug_vllm import compat

    common = SimpleNamespace(req_idx=req_idx, num_reqs=3)
    assert compat.request_rows(common, slots=True).tolist() == rows
    if req_idx is None:
        assert compat.request_rows(common, slots=False).tolist() == [0, 1, 2]


def test_a_step_whose_rows_are_nobodys_is_not_planned():
    from kvplug_vllm.router import Router

    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([5, 6], np.int32)))
    _, config = router_of(states)
    Router.check_named(config, SimpleNamespace(req_idx=np.array([1])))
    with pytest.raises(RuntimeError, match=r"V2 does not say .*VLLM_USE_V2_MODEL_RUNNER=0"):
        Router.check_named(config, SimpleNamespace(req_idx=None))


def test_models_with_recurrent_layers_name_their_rows_once_we_ask():
    state = source_of("vllm.v1.worker.gpu.model_states.mamba_hybrid")
    signature = next(
        each
        for cls in state.body
        if isinstance(cls, ast.ClassDef) and cls.name == "MambaHybridModelState"
        for each in cls.body
        if isinstance(each, ast.FunctionDef) and each.name == "prepare_attn"
    )
    assert [each.arg for each in signature.args.args][:2] == ["self", "input_batch"], (
        f"{MOVED}: MambaHybridModelState.prepare_attn; see compat.name_requests"
    )
    calls = [node for node in ast.walk(signature) if isinstance(node, ast.Call)]
    (build,) = (each for each in calls if ast.unparse(each.func) == "build_attn_metadata")
    assert all(each.arg != "req_idx" for each in build.keywords), (
        f"{MOVED}: rows are named now; compat.name_requests has had its time"
    )


def test_the_stock_builders_and_impls_keep_their_head_counts_under_the_names_we_set():
    cpu = source_of("vllm.v1.attention.backends.cpu_attn")
    flash = source_of("vllm.v1.attention.backends.flash_attn")
    for tree, cls, names in (
        (cpu, "CPUAttentionMetadataBuilder", {"num_heads", "num_kv_heads"}),
        (flash, "FlashAttentionMetadataBuilder", {"num_heads_q", "num_heads_kv"}),
        (cpu, "CPUAttentionBackendImpl", {"num_heads", "num_kv_heads", "num_queries_per_kv"}),
        (flash, "FlashAttentionImpl", {"num_heads", "num_kv_heads", "num_queries_per_kv"}),
    ):
        missing = names - assigned_attributes(tree, cls)
        assert not missing, (
            f"{MOVED}: {cls} has no {sorted(missing)}; see compat.single_head_builder and "
            "compat.single_head_impl"
        )


def test_the_fused_write_of_keys_can_still_be_declined():
    from vllm.v1.attention.backend import AttentionImpl

    assert hasattr(AttentionImpl, "fused_rope_kvcache_supported"), (
        f"{MOVED}: keys may be written past do_kv_cache_update; see PlannedImpl"
    )


def test_caches_of_eight_bits_are_bytes_with_a_scale_for_a_layer():
    """Every other dtype that vLLM keeps is plain, or refused with a reason of its own."""
    from typing import get_args

    import torch
    from vllm.config.cache import CacheDType
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

    from kvplug_vllm import eight_bits
    from kvplug_vllm.refusals import PAGES, PLAIN

    for dtype in eight_bits.NUMBERS:
        assert STR_DTYPE_TO_TORCH_DTYPE[dtype] is torch.uint8, f"{MOVED}: see eight_bits"
        assert get_kv_quant_mode(dtype) is KVQuantMode.FP8_PER_TENSOR, f"{MOVED}: see eight_bits"
    named = [part for part, _ in PAGES]
    others = {*get_args(CacheDType)} - {*PLAIN, *eight_bits.NUMBERS, "fp8_inc", "fp8_ds_mla"}
    new = [dtype for dtype in others if not any(part in dtype for part in named)]
    assert not new, f"{MOVED}: say in refusals.PAGES how pages of {new} differ"
    layer = source_of("vllm.model_executor.layers.attention.attention")
    assert "query_quant" in assigned_attributes(layer, "Attention"), f"{MOVED}: see eight_bits"
    text = ast.unparse(layer)
    for scale in ("_q_scale_float", "_k_scale_float", "_v_scale_float"):
        assert f"layer.{scale} = " in text, f"{MOVED}: layers have no {scale}; see eight_bits"
    for module, name in (
        ("cpu_attn", "CPUAttentionBackendImpl"),
        ("flash_attn", "FlashAttentionImpl"),
    ):
        tree = source_of(f"vllm.v1.attention.backends.{module}")
        assert "kv_cache_dtype" in assigned_attributes(tree, name), f"{MOVED}: see PlannedImpl"


def test_no_model_writes_keys_past_our_backends():
    """From 0.33 on FlashAttention allows it, and digests would never see those keys."""
    from vllm.v1.attention.backend import AttentionBackend

    from kvplug_vllm import cpu, cuda

    declined = "supports_kv_cache_update_bypass"
    assert Version(VLLM) < Version("0.33") or hasattr(AttentionBackend, declined), (
        f"{MOVED}: models ask for another permission; see PlannedBackend"
    )
    for backend in (cpu.KVPlugBackend, cuda.KVPlugBackend):
        assert getattr(backend, declined) is False


def test_the_cpu_serves_ours_with_the_page_size_of_its_own_backend():
    """0.33 asks the backend for it, once the model is there; 0.32's platform knows it itself."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from kvplug_vllm.cpu import KVPlugBackend

    for default in (16, 128):
        assert KVPlugBackend.get_preferred_block_size(
            default
        ) == CPUAttentionBackend.get_preferred_block_size(default)


def test_layers_have_the_number_in_their_name():
    from kvplug_vllm import compat

    assert compat.layer_index("model.layers.7.self_attn.attn") == 7


def test_padding_lies_at_the_end_of_a_page():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, compute_layout_strides
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from kvplug_vllm import compat

    heads, D, S, rows, pages = 3, 8, 16, 2, 5
    digest = rows * heads * D
    spec = FullAttentionSpec(
        block_size=S,
        num_kv_heads=heads,
        head_size=D,
        dtype=torch.float32,
        page_size_padded=4 * (heads * S * 2 * D + digest),
    )
    strides = compute_layout_strides(spec, pages, 1, KVCacheLayout.LBHNC)
    memory = torch.arange(pages * spec.page_size_bytes // 4, dtype=torch.float32)
    cache = memory.as_strided(
        (pages, heads, S, 2 * D), [*(stride // 4 for stride in strides[1:4]), 1]
    )
    tail = compat.page_tail(cache, 1, rows, D)
    assert tail.shape == (pages, heads, rows, D)
    both = torch.cat([cache.flatten(1), tail.flatten(1)], 1)
    assert both.flatten().tolist() == memory.tolist(), (
        f"{MOVED}: page_size_padded; see compat.page_tail"
    )


def test_digests_are_content_of_their_pages_and_no_padding():
    """vLLM's own connector moves what is not padding; tests/vllm/test_offloading.py runs it."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvplug_vllm.cache import DigestedSpec

    shape = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    plain = FullAttentionSpec(**shape).page_size_bytes
    spec = DigestedSpec(**shape, digest_bytes=1024, page_size_padded=plain + 1024)
    merged = DigestedSpec.merge([spec, spec])
    assert merged == spec, f"{MOVED}: FullAttentionSpec.merge; see cache.DigestedSpec"
    assert merged.unpadded_page_size_bytes == merged.page_size_bytes == plain + 1024, (
        f"{MOVED}: unpadded_page_size_bytes; see cache.DigestedSpec"
    )


def router_of(*rest, backend="KVPLUG"):
    from kvplug_vllm.router import Router

    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend and SimpleNamespace(name=backend)),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        additional_config={},
    )
    return Router(config, *rest), config


def test_the_router_is_a_logits_processor_of_both_model_runners():
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessor as V1
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2

    from kvplug_vllm.router import Router

    assert issubclass(Router, V1)
    assert issubclass(Router, V2)
    assert not Router.__abstractmethods__, (
        f"{MOVED}: a processor now needs {Router.__abstractmethods__}"
    )
    assert parameters(V1.__init__) == ["self", "vllm_config", "device", "is_pin_memory"]
    assert parameters(V2.__init__) == ["self", "vllm_config", "req_states"]
    logits = torch.ones(2, 3)
    for router in (router_of(torch.device("cpu"), False)[0], router_of(SimpleNamespace())[0]):
        assert router.is_argmax_invariant()
        assert router.apply(logits) is router.apply(logits, SimpleNamespace()) is logits
        assert not router.add_request(0, SimpleNamespace())
        router.apply_staged_writes()


def test_model_runner_v1_loads_the_router_beside_drafts_once_we_ask(
    monkeypatch,
):
    import torch
    from vllm.v1.sample import logits_processor as package

    from kvplug_vllm import compat
    from kvplug_vllm.router import Router

    source = Path(find_spec("vllm.v1.worker.gpu_model_runner").origin).read_text()
    assert "logits_processor import LogitsProcessors, build_logitsprocs" in source, MOVED
    stock = inspect.unwrap(package.build_logitsprocs)
    given = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        attention_config=SimpleNamespace(backend=None),
        speculative_config=SimpleNamespace(),
    )
    loaded = [type(each) for each in stock(given, torch.device("cpu"), False, False).all]
    assert loaded
    assert Router not in loaded, f"{MOVED}: see compat.show_rows_beside_drafts"

    monkeypatch.setattr(package, "build_logitsprocs", stock)
    compat.show_rows_beside_drafts(Router)
    compat.show_rows_beside_drafts(Router)
    shown = package.build_logitsprocs(given, torch.device("cpu"), False, False, ()).all
    assert sorted(map(repr, map(type, shown))) == sorted(map(repr, [*loaded, Router]))
    plain = SimpleNamespace(**{**vars(given), "speculative_config": None})
    monkeypatch.setattr(package, "_load_custom_logitsprocs", lambda _: [])
    others = package.build_logitsprocs(plain, torch.device("cpu"), False, False).all
    assert Router not in map(type, others)


def test_model_runner_v1_s_draft_model_gets_its_own_group_s_blocks(monkeypatch):
    from vllm.v1.worker import gpu_model_runner as module

    from kvplug_vllm import compat

    build = module.GPUModelRunner._build_attention_metadata
    source = inspect.getsource(inspect.unwrap(build))
    _, _, asked = source.partition("isinstance(\n                    self.drafter,")
    first, _, rest = asked.partition(")")
    assert "EagleProposer" in first, f"{MOVED}: see compat.give_draft_models_their_blocks"
    assert "DraftModelProposer" not in first, "it asks: delete compat's own"
    assert "self.drafter.kv_cache_gid == kv_cache_gid" in rest
    sizes = inspect.getsource(module.DraftModelProposer.set_inputs_first_pass)
    assert "new_slot_mapping = compute_new_slot_mapping(" in sizes, MOVED

    @dataclasses.dataclass
    class Common:
        num_reqs: int
        block_table_tensor: str

        def replace(self, **fields):
            return dataclasses.replace(self, **fields)

    def stock(runner):
        return "metadata", runner.first

    monkeypatch.setattr(module.GPUModelRunner, "_build_attention_metadata", stock)
    for _ in range(2):
        compat.give_draft_models_their_blocks()
    tables = [
        SimpleNamespace(get_device_tensor=lambda rows, group=group: f"{rows} rows of {group}")
        for group in range(2)
    ]
    runner = SimpleNamespace(
        first=Common(3, "3 rows of 0"), input_batch=SimpleNamespace(block_table=tables)
    )
    ask = partial(module.GPUModelRunner._build_attention_metadata, runner)
    assert ask()[1].block_table_tensor == "3 rows of 0"
    runner.drafter = module.DraftModelProposer.__new__(module.DraftModelProposer)
    runner.drafter.kv_cache_gid = 1
    assert ask() == ("metadata", Common(3, "3 rows of 1"))
    runner.first = None
    assert ask() == ("metadata", None)


def test_model_runner_v2_takes_the_router_from_its_entry_point():
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    from kvplug_vllm.router import Router

    assert loader.LOGITSPROCS_GROUP == "vllm.logits_processors"
    assert loader._load_v2_logitsprocs_by_fqcns(["kvplug_vllm.router:Router"]) == [Router]


def test_the_router_follows_the_rows_of_model_runner_v1():
    import torch
    from vllm.v1.sample.logits_processor.interface import (
        AddedRequest,
        BatchUpdate,
        MoveDirectionality,
    )

    from kvplug_vllm.router import UNKNOWN, Router

    assert len(AddedRequest.__args__) == 4, f"{MOVED}: AddedRequest; see Router.update_state"
    router, config = router_of(torch.device("cpu"), False)

    def prompts():
        common = SimpleNamespace(req_idx=None, num_reqs=4)
        return Router.prompts(config, common).tolist()

    def update(removed=(), added=(), moved=()):
        added = [(row, None, [0] * length, []) for row, length in added]
        router.update_state(BatchUpdate(4, list(removed), added, list(moved)))

    assert prompts() == [UNKNOWN] * 4
    update(added=[(0, 5), (1, 6), (2, 7)])
    assert prompts() == [5, 6, 7, UNKNOWN]
    router.update_state(None)
    update(removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert prompts() == [7, 6, UNKNOWN, UNKNOWN]
    update(removed=[1], added=[(1, 9)], moved=[(0, 1, MoveDirectionality.SWAP)])
    assert prompts() == [9, 7, UNKNOWN, UNKNOWN]


def test_the_router_reads_the_slots_of_model_runner_v2():
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcRequestState

    from kvplug_vllm.router import UNKNOWN, Router

    assert "prompt_len" in {f.name for f in fields(LogitsProcRequestState)}, (
        f"{MOVED}: LogitsProcRequestState; see Router.prompts"
    )
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([5, 6, 7, 8], np.int32)))
    _, config = router_of(states)
    common = SimpleNamespace(req_idx=np.array([3, 0, 4]), num_reqs=3)
    assert Router.prompts(config, common).tolist() == [8, 5, UNKNOWN]
    assert Router.prompts(SimpleNamespace(), common).tolist() == [UNKNOWN] * 3


def test_a_router_of_an_engine_without_kvplug_does_nothing():
    import torch
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    from kvplug_vllm.router import UNKNOWN, Router

    for backend in (None, "CPU_ATTN"):
        router, config = router_of(torch.device("cpu"), False, backend=backend)
        router.update_state(BatchUpdate(1, [], [(0, None, None, [])], []))
        common = SimpleNamespace(req_idx=None, num_reqs=1)
        assert Router.prompts(config, common).tolist() == [UNKNOWN]


def test_a_prompt_of_embeddings_has_a_length_or_is_refused():
    """Model Runner V1 hands over no token ids for it; with the policy dense nothing refuses it."""
    import torch
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    router, _ = router_of(torch.device("cpu"), False)
    router.update_state(BatchUpdate(1, [], [(0, None, None, [])], []))
