"""What kvplug takes of memory beside the pool is known to SGLang before it sizes the pool."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests import heads

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

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


def choosing(line: str, queries: int = 8192, lists: bool = False, **more) -> float:
    from kvplug import read_offer
    from kvplug_sglang.graph_memory import choosing_bytes

    offer = read_offer({"policy": line, **more}, environ={})
    return choosing_bytes(offer, MODEL, 1, 32, queries, lists) / MIB


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


def test_sglang_leaves_room_for_them_and_for_packing(resolve):
    policies = (None, "dense", "quest(budget=64)", "streaming_llm", "knorm(budget=64)",
                "block_quest(budget=4096)")  # fmt: skip
    stock, dense, selects, evicts, packs, blocks = (resolve(line)["ours"] for line in policies)
    assert stock == dense == 0 < selects
    assert 0 < blocks != selects, "what choosing for a prompt takes"
    longest = 2 * 8192 * 2 * 64 * 2 / MIB  # keys and values of a layer: two heads of 64, 16 bits
    assert longest < packs - evicts < 2 * longest, "their graphs are alike"


@pytest.mark.parametrize(
    "policy",
    [
        "snapkv(budget=96)",
        "pyramid(keydiff(budget=96), beta=4) + quest(budget=64)",
        "duo(keydiff(budget=512), heads={heads!r}, sink=16, recent=48)",
    ],
)
def test_packing_takes_what_sglang_was_told_whoever_ends_together(
    engine, random_llama, prompts, monkeypatch, tmp_path, policy
):
    """By the tensors that are alive at once: three prompts of almost the longest, in one step."""
    from kvplug_sglang import compat
    from kvplug_sglang.attention import PlannedAttention
    from kvplug_sglang.compression import Taken, packing_bytes

    pack, taken, steps = PlannedAttention._pack, [], set()

    def measured(backend, layer, packing):
        with Taken() as found:
            pack(backend, layer, packing)
        taken.append(found.most)
        steps.add(id(backend.plans[0]))

    monkeypatch.setattr(PlannedAttention, "_pack", measured)
    heads.losing({0: [0.9, 0.1], 1: [0.1, 0.9]}).save(tmp_path / "heads.json")
    policy = policy.format(heads=str(tmp_path / "heads.json"))
    options = {"context_length": 2048, "chunked_prefill_size": 8192}
    with engine(random_llama(), policy, **options) as planned:
        planned.generate(prompts(2040, 2040, 2040, seed=3), 4)
        assert len(steps) == 1, "all at once"
        assert len(taken) == 3 * 2, "one prompt at a time, in two layers"
        offer, model = planned.backend.engine.offer, planned.scheduler.model_config
        dtype = compat.cache_dtype(planned.scheduler.server_args, model)
        told = packing_bytes(offer, model, 1, 16, dtype)
        assert max(taken) <= told < 1.3 * max(taken)


@pytest.mark.parametrize("scratch", [0, 1 << 22], ids=["a head at once", "two at once"])
def test_a_prompt_over_codes_takes_what_sglang_was_told(monkeypatch, scratch):
    """By the tensors that are alive at once where pages are decoded into those that return alone,
    as the kernel does: the last 96 tokens of 2,048, eight KV heads."""
    import numpy as np
    import torch

    from kvplug import coded, parse
    from kvplug_sglang.compression import Taken
    from kvplug_sglang.graph_memory import decoded_bytes

    T, queries, H, G, D, S = 2048, 96, 8, 2, 64, 32
    format = parse("kivi(bits=4)").format
    layout = format.layout(S, D, torch.float32)

    def decode(cache, pages, layout):
        return torch.empty(2, len(pages), S, cache.shape[1], D).unbind()

    monkeypatch.setattr(coded, "SCRATCH", scratch)
    monkeypatch.setattr(coded, "decode_pages", decode)
    cache = torch.zeros(T // S, H, layout.page_bytes, dtype=torch.uint8)
    arena = torch.zeros(1, S, 2, H, D), torch.zeros(1, 1, dtype=torch.int64)
    writes = coded.Writes.of(
        torch.arange(T - queries, T), np.array([T - queries]), np.array([T]), S,
        lambda values, dtype: torch.as_tensor(values, dtype=dtype),
    )  # fmt: skip
    monkeypatch.setattr(coded, "encode_pages", lambda *_: None)  # nor does it take any
    query, (keys, values) = torch.randn(queries, H * G, D), torch.randn(2, queries, H, D)
    run = coded.Run(0, T - queries, queries, 0, torch.arange(T // S - 1).int())
    output = torch.empty_like(query)
    with Taken() as found:
        read = coded.write(keys, values, cache, layout, coded.OpenPages(*arena), writes)
        coded.read(query, cache, layout, read, coded.CodedReads(None, [run]), 0.1, output)
    view = SimpleNamespace(max_running_requests=1, chunked_prefill_size=queries, tp_size=1)
    model = SimpleNamespace(
        context_len=T, head_dim=D, dtype=torch.float32, num_attention_heads=H * G,
        get_num_kv_heads=lambda ranks: H // ranks,
    )  # fmt: skip
    told = decoded_bytes(format, view, model, S)
    assert found.most <= told < 1.3 * found.most
    assert decoded_bytes(format, view, model, 16) == 0, "refused elsewhere"


def test_a_score_that_cannot_be_rehearsed_is_refused(monkeypatch):
    import torch

    from kvplug import read_offer
    from kvplug.policies.knorm import KNorm
    from kvplug_sglang.compression import packing_bytes

    monkeypatch.setattr(KNorm, "score", lambda self, prompt: prompt.keys.sum().item())
    offer = read_offer({"policy": "knorm(budget=64)"}, environ={})
    with pytest.raises(ValueError, match=r"knorm.score takes of memory could not be found out"):
        packing_bytes(offer, SimpleNamespace(**vars(MODEL), dtype=torch.bfloat16), 1, 16,
                      torch.bfloat16)  # fmt: skip


def test_a_dense_server_plans_nothing_and_counts(engine, random_llama, prompts, monkeypatch):
    from kvplug_sglang.step import StepPlanner

    def refuse(*args, **kwargs):
        raise AssertionError("a dense server planned a step")

    for name in ("plan", "segments", "_tensor", "table"):
        monkeypatch.setattr(StepPlanner, name, refuse)
    with engine(random_llama(), "dense") as planned:
        planned.generate(prompts(40, 300, 1), 6)
        counted = planned.counted()
    behind = [n + new for n in (40, 300, 1) for new in range(1, 6)]
    assert counted["decode_queries"] == len(behind)
    assert counted["cached_tokens"] == counted["read_tokens"] == sum(behind)


def test_they_hold_no_lists_where_flash_attention_reads_tables():
    """256 requests of 131,072 tokens, 8 KV heads."""
    tables, lists = held("quest(budget=8192)"), held("quest(budget=8192)", kv_splits=8)
    assert 64 < tables < 128
    assert tables + 96 < lists < 256
    assert held("snapkv(budget=4096)", kv_splits=8) > 256, "a list of the whole context"
    assert held("snapkv(budget=4096)") < 48
    assert held("quest(budget=8192)", batch=0) == 0


def test_heads_with_tables_of_their_own_are_reckoned_with(tmp_path):
    """Of two kinds: half of a request's 131,072 tokens are 2,048 pages, of eight heads."""
    import torch

    from kvplug.head_pages import head_tables
    from kvplug_sglang.compression import Taken

    shape = replace(heads.LLAMA, layers=36, heads=32, kv_heads=8)
    lost = {n: [0.9 if (n + h) % 2 else 0.1 for h in range(8)] for n in range(36)}
    heads.losing(lost, shape).save(tmp_path / "heads.json")
    base, pages = "snapkv(budget=4096)", 131072 // 32
    line = f"duo({base}, heads={str(tmp_path / 'heads.json')!r})"
    table = torch.zeros(4, pages, dtype=torch.int32)
    with Taken() as taken:
        head_tables(table, torch.ones(4).int(), torch.ones(4, 8).int(), pages, 256, 1)
    more = held(line, batch=4) - held(base, batch=4)
    assert taken.most / MIB <= more < 1.3 * taken.most / MIB
    lists = held(line, batch=4, kv_splits=8) - held(base, batch=4, kv_splits=8) - more
    assert lists == 2 * 4 * 8 * 8 * 131072 / MIB, "two kinds' lists of all tokens"


def test_choosing_for_prompts_is_reckoned_with():
    """128 blocks of 64 queries over 131,072 tokens, 8 KV heads: shares twice, a table or lists."""
    tables, lists = (choosing("xattention(budget=16384)", lists=each) for each in (False, True))
    shares = 2 * 4 * 128 * 8 * 4096 / MIB
    assert tables == shares + 128 * 8 * 512 * 8 / MIB
    assert lists == shares + 128 * 8 * 512 * (4 + 8 * 32) / MIB
    assert choosing("dense", allow=["xattention"]) == tables, "a request may"
    asked = (4 * 131072 * (3 * 64 * 4 + 2 * 128) / MIB) + 3 * 4 * shares / 2
    assert choosing("minference(budget=16384)") == tables + asked, "logits of the last 64 queries"
    assert choosing("a_shape") == choosing("quest") == 0
