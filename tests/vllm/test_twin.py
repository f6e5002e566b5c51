"""What users of a GPU run, as far as a CPU can: Model Runner V2, FlashAttention, replayed graphs.

``cuda_path`` says what stands in for what, and what none of this can show. Steps that are replayed
run no Python of ours: here they must answer as the same steps run eagerly.
"""

from __future__ import annotations

import gc
import logging
import random
import weakref
from typing import Any

import pytest
import torch
import twin

from tests.vllm.drafts import SPECULATIVE

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not twin.MODE.startswith("graphs"), reason="needs KVPLUG_TWIN=graphs"),
]

collect = gc.collect  # also while an engine starts
POLICIES = [
    "dense",
    "quest(budget=64, dense_layers=0)",
    "quest(budget=128, top_p=0.9, dense_layers=1)",
    "streaming_llm(sinks=32, window=96)",
    "snapkv(budget=128)",
    "keydiff(budget=160) + quest(budget=96, dense_layers=1)",
    "pyramid(snapkv(budget=128, window=32), beta=4)",
    "twilight(budget=0.15, dense_layers=0)",
    "snapkv(budget=160) + twilight(budget=64, top_p=0.9, dense_layers=1)",
]
LENGTHS = (300, 33, 600, 1, 64, 257, 450, 513, 90)
"""257 and 513: the last chunk is a single token, which is replayed as a decode."""


def waves(engine, prompts, sizes=(1, 2, 3, 5, 9)):
    """Batches that pad to what was captured, chunks beside decodes, and a turn over the cache."""
    batch = prompts(*LENGTHS)
    answers = [engine.generate([batch[5]], 8), engine.generate([batch[7]], 8)]
    answers += [engine.generate(batch[:size], 6) for size in sizes]
    answers.append(engine.generate([prompt + batch[1] for prompt in batch[:5]], 6))
    return answers


def replays() -> int:
    from recorded import Graph

    return Graph.replays


@pytest.mark.parametrize(
    "policy, hybrid, most",
    [
        ("keydiff(budget=0.25, chunk=512)", False, 8),
        ("keydiff(budget=0.25, chunk=512)", True, 0),
        ("keydiff(budget=512, chunk=128)", True, 8),
    ],
)
def test_nothing_waits_for_the_next_step_where_blocks_are_blanked_before_it(policy, hybrid, most):
    """vLLM blanks new blocks of a model with recurrent layers before a step is planned."""
    from types import SimpleNamespace

    from vllm.config import CUDAGraphMode

    from kvplug_vllm.cuda import KVPlugBuilder, most_replayed

    config: Any = SimpleNamespace(
        additional_config={"kvplug": {"policy": policy}}, speculative_config=None,
        model_config=SimpleNamespace(is_hybrid=hybrid),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL, max_cudagraph_capture_size=8
        ),
    )  # fmt: skip
    assert most_replayed(config) == most
    support = KVPlugBuilder.get_cudagraph_support(config, None)
    assert (support.name == "NEVER") == (not most)


@pytest.mark.parametrize("policy", POLICIES)
def test_replayed_steps_answer_as_eager_ones(engine, random_llama, prompts, policy):
    from cuda_path import eagerly

    model, options = random_llama(), {"max_model_len": 1024, "max_num_seqs": 12}
    with eagerly(), engine(model, {"policy": policy}, **options) as planned:
        before = replays()
        expected = waves(planned, prompts)
        assert replays() == before
    with engine(model, {"policy": policy}, **options) as planned:
        found = waves(planned, prompts)
        assert replays() > before + 20
        assert found == expected


def test_one_kv_head_beside_a_chunk_of_a_prompt(engine, random_llama, prompts):
    """As a rank of many has it: a selecting decode is then one sequence, as is the chunk."""
    from cuda_path import eagerly

    model = random_llama(heads=4, kv_heads=1)
    settings = {"policy": "quest(budget=64, dense_layers=1)"}
    first, second = prompts(400, 700)

    def answers():
        with engine(model, settings, max_model_len=1024, max_num_batched_tokens=65) as planned:
            core = planned.llm.llm_engine
            from vllm import SamplingParams

            def add(name, prompt, tokens):
                params = SamplingParams(
                    temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
                )
                core.add_request(name, {"prompt_token_ids": prompt}, params)

            add("first", first, 24)
            done = {}
            for step in range(200):
                if step == 10:
                    add("second", second, 6)
                for output in core.step():
                    if output.finished:
                        done[output.request_id] = list(output.outputs[0].token_ids)
                if len(done) == 2:
                    break
            return done

    with eagerly():
        expected = answers()
    assert answers() == expected
    assert {len(tokens) for tokens in expected.values()} == {24, 6}


@pytest.mark.parametrize("policy", ["snapkv(budget=96) + quest(budget=64, dense_layers=1)"])
def test_memory_settles(engine, random_llama, prompts, policy):
    """200 steps of changing shapes leave behind no tensor that a few steps did not."""
    source = random.Random(5)

    def mixed(engine, requests):
        for _ in range(requests):
            lengths = [source.randrange(1, 700) for _ in range(source.randrange(1, 9))]
            engine.generate(prompts(*lengths, seed=source.randrange(99)), source.randrange(1, 12))

    def kept() -> dict[int, Any]:
        gc.collect()
        storages = {}
        for each in gc.get_objects():
            if type(each) is torch.Tensor or isinstance(each, torch.nn.Parameter):
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = tuple(each.shape), each.dtype
        return storages

    with engine(random_llama(), {"policy": policy}, max_model_len=1024) as planned:
        mixed(planned, 6)
        before, steps = kept(), Steps(planned)
        while steps.count < 200:
            mixed(planned, 1)
        after = kept()
        more = [after[address] for address in after.keys() - before.keys()]
        assert len(after) <= len(before), f"tensors that a few steps did not leave: {more}"


class Steps:
    """Counts an engine's steps."""

    def __init__(self, engine) -> None:
        self.count = 0
        runner = engine.llm.llm_engine.engine_core.engine_core.model_executor
        execute = runner.driver_worker.worker.model_runner.execute_model

        def counted(*args, **kwargs):
            self.count += 1
            return execute(*args, **kwargs)

        runner.driver_worker.worker.model_runner.execute_model = counted


def test_the_profiled_cache_is_let_go(engine, random_llama, monkeypatch):
    """Graphs are profiled over a cache that the engine throws away before the real one."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    profile, profiled = GPUModelRunner.profile_cudagraph_memory, []
    initialize = GPUModelRunner.initialize_kv_cache

    def watch(self, config, *args, **kwargs):
        result = initialize(self, config, *args, **kwargs)
        context = self.vllm_config.compilation_config.static_forward_context
        profiled.extend(weakref.ref(layer.kv_cache) for layer in context.values())
        storages.append(next(iter(context.values())).kv_cache.untyped_storage().data_ptr())
        return result

    def then(self):
        monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", watch)
        found = profile(self)
        monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", initialize)
        collect()
        assert profiled, "nothing was profiled"
        alive = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        held.append(
            [each.shape for each in alive if each.untyped_storage().data_ptr() in storages]
        )
        return found

    storages, held = [], []
    monkeypatch.setattr(GPUModelRunner, "profile_cudagraph_memory", then)
    with engine(random_llama(), {"policy": "snapkv(budget=96) + quest(budget=64)"}):
        assert held == [[]], "views of the profiled cache live on"


def test_a_start_counts_nothing_and_announces_once(engine, random_llama, monkeypatch):
    from kvplug_vllm.metrics import Metrics

    counted, lines = [], []
    monkeypatch.setattr(Metrics, "count", lambda self, reads, settings: counted.append(reads))
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.kvplug")
    logger.addHandler(handler)
    try:
        with engine(random_llama(), {"policy": "quest(budget=64)"}):
            assert [reads for reads in counted if reads.queries] == []
    finally:
        logger.removeHandler(handler)
    assert len([line for line in lines if line.startswith("kvplug: quest")]) == 1


def test_a_dense_server_plans_nothing(engine, random_llama, prompts, monkeypatch):
    from kvplug_vllm.step import PlannedBuilder

    def refuse(*args, **kwargs):
        raise AssertionError("a dense server planned a step")

    for name in ("plan_step", "_tensor", "_lasting", "_table"):
        monkeypatch.setattr(PlannedBuilder, name, refuse)
    with engine(random_llama(), {"policy": "dense"}) as planned:
        assert all(map(len, planned.generate(prompts(40, 300, 1), 6)))


def test_packing_the_longest_prompt_fits_what_was_profiled(engine, random_llama, prompts):
    """By the tensors that are alive at once: what a rehearsal without a cache takes at most."""
    with engine(
        random_llama(), {"policy": "snapkv(budget=96)"}, max_model_len=2048, max_num_seqs=4
    ) as planned:
        layer = next(iter(planned.layers.values()))
        impl = layer.impl
        key = torch.zeros(1, impl.num_kv_heads, impl.head_size)
        with Allocated() as rehearsed:
            impl.rehearse(layer, key)
        pack, taken = impl.pack, []

        def measured(*args, **kwargs):
            with Allocated() as packed:
                pack(*args, **kwargs)
            taken.append(packed.most)

        impl.pack = measured
        planned.generate(prompts(2040, 2040, 2040, seed=3), 4)
        assert len(taken) == 3, "one prompt at a time"
        assert max(taken) <= rehearsed.most
        cache = 2 * 2048 * impl.num_kv_heads * impl.head_size * 4
        assert cache < rehearsed.most < 12 * cache


class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that tensors made within hold at once."""

    def __enter__(self):
        self.now = self.most = 0
        self.known = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {
            each.untyped_storage().data_ptr()
            for each in torch.utils._pytree.tree_leaves((args, kwargs))
            if torch.is_tensor(each)
        }
        for each in torch.utils._pytree.tree_leaves(found):
            if torch.is_tensor(each):
                storage = each.untyped_storage()
                if storage.data_ptr() not in given | self.known:
                    self._add(each, storage)
        return found

    def _add(self, tensor, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        self.known.add(address)
        self.now += size
        self.most = max(self.most, self.now)

        def gone():
            self.now -= size
            self.known.discard(address)

        weakref.finalize(storage, gone)


def test_a_purpose_has_one_content_in_a_step():
    from kvplug_vllm.cuda import Lasting

    lasting = Lasting(4, torch.device("cpu"))
    lasting.begin()
    first = lasting.put("lengths", torch.arange(3), 4, None)
    with pytest.raises(AssertionError, match="lengths is wanted twice"):
        lasting.put("lengths", torch.arange(3), 4, None)
    lasting.begin()
    again = lasting.put("lengths", torch.arange(2), 4, None)
    assert again.data_ptr() == first.data_ptr(), "where a graph finds it"
    assert first.tolist() == [0, 1, 2]


def test_stand_ins_do_what_vllms_kernels_do(engine, random_llama, prompts):
    import v2

    with (
        engine(random_llama(), {"policy": "dense"}, max_model_len=1024) as planned,
        v2.checked() as launches,
    ):
        planned.generate(prompts(300, 33, 1), 5)
        planned.generate(prompts(600, 64, 257, 90, seed=1), 3)
    with (
        engine(
            random_llama(), {"policy": "dense"}, max_model_len=512, speculative_config=SPECULATIVE
        ) as planned,
        v2.checked() as drafted,
    ):
        planned.generate([[7, 8, 9] * 30, *prompts(33)], 4)
    launches += drafted
    names = {name for _, name in v2.KERNELS}
    names |= {"gather_block_tables", "compute_slot_mappings", "rejection_sample"}
    assert names - {"expand_idx_mapping"} <= set(launches), (
        f"never launched: {names - set(launches)}"
    )
