"""What decode graphs hold of kvplug's is known to SGLang before it sizes the pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MODEL = SimpleNamespace(
    context_len=131072, num_attention_heads=32, head_dim=128, num_hidden_layers=36,
    get_num_kv_heads=lambda ranks: 8 // ranks,
)  # fmt: skip
MIB = 1 << 20


def held(line: str, batch: int = 256, page_size: int = 32, kv_splits: int = 0, **more) -> float:
    from kvplug import read_offer
    from kvplug_sglang.graph_memory import graph_bytes

    offer = read_offer({"policy": line, **more}, environ={})
    return graph_bytes(offer, MODEL, 1, batch, page_size, kv_splits) / MIB


@pytest.fixture
def resolve(random_llama, monkeypatch):
    """What SGLang saw of graphs of prefill, and the MiB that are left free for ours."""

    def resolve(policy: str | None):
        from sglang.srt.arg_groups import memory_hook, resolution_hooks
        from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import ServerArgs

        from kvplug_sglang import compat

        load_plugins()
        seen = {}

        def as_on_a_gpu(server_args, previous):
            previous(server_args)
            graphs = default_cuda_graph_config()
            graphs.decode.max_bs, graphs.prefill.backend = 64, "breakable"
            compat.declare(server_args, {"cuda_graph_config": graphs})

        monkeypatch.setitem(resolution_hooks._HOOKS, "handle_platform_defaults", [as_on_a_gpu])
        plan, size = memory_hook.post_capture_kv_sizing_planned, memory_hook.reserve_for_graph_mb

        def planned(server_args):
            config = memory_hook.resolving_view(server_args).cuda_graph_config
            seen["prefill"] = config.prefill.backend
            seen["ours"] = size(server_args) - size.__wrapped__(server_args)
            return plan(server_args)

        monkeypatch.setattr(memory_hook, "post_capture_kv_sizing_planned", planned)
        more = {} if policy is None else {"attention_backend": "kvplug"}
        monkeypatch.setenv("KVPLUG_POLICY", policy or "")
        ServerArgs(model_path=str(random_llama()), device="cpu", **more).resolve_once()
        return seen

    return resolve


def test_prefill_without_graphs_is_decided_before_memory_is_sized(resolve):
    """SGLang leaves little for prefill that graphs serve, and kvplug turns those graphs off."""
    assert resolve("dense")["prefill"] != "disabled"
    assert resolve("quest(budget=64)")["prefill"] == "disabled"


def test_sglang_leaves_room_for_them(resolve):
    stock, dense, sparse = (resolve(line)["ours"] for line in (None, "dense", "quest(budget=64)"))
    assert stock == dense == 0 < sparse


def test_they_hold_no_lists_where_flash_attention_reads_tables():
    """256 requests of 131,072 tokens, 8 KV heads."""
    tables, lists = held("quest(budget=8192)"), held("quest(budget=8192)", kv_splits=8)
    assert 64 < tables < 128
    assert tables + 96 < lists < 256
    assert held("snapkv(budget=4096)", kv_splits=8) > 256, "a list of the whole context"
    assert held("snapkv(budget=4096)") < 48
    assert held("quest(budget=8192)", batch=0) == 0
