"""Real engines in this process: scheduler, worker and test share it, so a test may look inside."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import twin

from tests.pace import Pace

# Before vLLM or torch start a thread: in one process the engine would bind to a single core.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    THP_MEM_ALLOC_ENABLE="1",  # of torch: a cache is cleared in a quarter of the time
)
twin.install()

MiB = 1 << 20


class Engine:
    """A vLLM engine and what a test asks of it. Greedy, fp32, eager, page size 32, chunk 256."""

    def __init__(self, model: Path, kvplug: dict[str, Any] | None, **options: Any) -> None:
        from vllm import LLM

        if kvplug is not None:
            options = {
                "attention_backend": "kvplug",
                "additional_config": {"kvplug": kvplug},
                **options,
            }
        Pace.starts += 1
        with uncollected():
            self.llm = self._start(LLM, model, options)
        self.config = self.llm.llm_engine.vllm_config

    @staticmethod
    def _start(cls: Any, model: Path, options: dict[str, Any]) -> Any:
        replace_kernels_once()
        return cls(
            str(model),
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "block_size": 32,
                "max_num_batched_tokens": 256,
                "max_num_seqs": 8,
                "max_model_len": 4096,
                "kv_cache_memory_bytes": 256 * MiB,
                "skip_tokenizer_init": True,
                "disable_log_stats": False,
                "seed": 0,
                **options,
            },
        )

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def all_layers(self) -> dict[str, Any]:
        return self.config.compilation_config.static_forward_context

    @property
    def layers(self) -> dict[str, Any]:
        """The model's own, without those of its drafter."""
        drafter = getattr(self.runner, "drafter", None) or getattr(self.runner, "speculator", None)
        names = ("_draft_attn_layer_names", "draft_attn_layer_names")  # of V1, of V2
        drafts = set().union(*(getattr(drafter, name, ()) for name in names))
        return {name: layer for name, layer in self.all_layers.items() if name not in drafts}

    @property
    def runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    @property
    def impls(self) -> list[Any]:
        return [layer.impl for layer in self.layers.values()]

    @property
    def selected(self) -> list[int]:
        """Queries that went through a selection, per layer."""
        from kvplug_vllm.compat import layer_index

        counted: dict[int, int] = {}
        for builder in self.builders:
            counted.update(builder.selected_queries)
        return [counted.get(layer_index(name), 0) for name in self.layers]

    @property
    def builders(self) -> list[Any]:
        groups = [group for groups in self.runner.attn_groups for group in groups]
        own = [group for group in groups if not self.layers.keys().isdisjoint(group.layer_names)]
        return [group.get_metadata_builder() for group in own]

    def without_shortcut(self) -> None:
        """From now on everything goes through selection and rewritten tables."""
        from kvplug import Planner

        for builder in self.builders:
            batch = builder.planner
            settings = replace(batch.planners[0].settings, shortcut=False)
            batch.planners[0] = Planner(settings, batch.page_size, *batch.budgets)

    def generate(
        self, prompts: list[list[int]], tokens: int = 16, **sampling: Any
    ) -> list[list[int]]:
        """All prompts at once -> output tokens each."""
        return [list(o.outputs[0].token_ids) for o in self.run(prompts, tokens, **sampling)]

    def run(self, prompts: list[list[int]], tokens: int = 16, **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        sampling = {"temperature": 0, "ignore_eos": True, "detokenize": False, **sampling}
        parameters = SamplingParams(max_tokens=tokens, **sampling)
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )

    def poison(self, freed: bool) -> list[int]:
        """Spoil blocks as they are handed out; with ``freed`` (no prefix cache) as they return.

        NaN for what is free, a large number for what is new: the stock kernel multiplies the
        unwritten rest of a page by zero. Returns the ids of blocks that returned while their
        request lived on, appended to as it happens.
        """
        import torch

        caches = {}
        for cache in (layer.kv_cache for layer in self.all_layers.values()):
            start, size = cache.storage_offset(), cache.stride(0)
            start = start if start >= size else 0  # a block may have all layers' pages
            caches[cache.untyped_storage().data_ptr(), start] = cache
        pool, scheduler = self.pool, self.scheduler
        new_blocks, free_blocks = pool.get_new_blocks, pool.free_blocks
        returned: list[int] = []

        def spoil(blocks: list[Any], value: float) -> None:
            for (_, first), cache in caches.items():
                size = cache.stride(0)
                filling: float = value
                if cache.dtype is torch.uint8:  # the same of e4m3 and of e5m2
                    filling = 0x7F if math.isnan(value) else 0x7B
                for block in blocks:  # its tokens and its digest
                    start = first + block.block_id * size
                    cache.as_strided((size,), (1,), start).fill_(filling)

        def get_new_blocks(count: int) -> list[Any]:
            blocks = new_blocks(count)
            spoil(blocks, 1e4)
            return blocks

        def free(ordered: Any) -> None:
            blocks = list(ordered)
            free_blocks(blocks)
            gone = [block for block in blocks if block.ref_cnt == 0 and not block.is_null]
            if scheduler.running:
                returned.extend(block.block_id for block in gone)
            if freed:
                spoil(gone, float("nan"))

        pool.get_new_blocks, pool.free_blocks = get_new_blocks, free
        return returned

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()


@functools.cache
def replace_kernels_once() -> None:
    """As every engine starts, vLLM seeks in all that a process has loaded the Triton kernels that
    a CPU has others for; whatever came since has those already."""
    from vllm.triton_utils import dispatcher

    register, replaced = dispatcher.register_kernels, set()

    def once(kernels: dict[str, Any]) -> None:
        if new := {name: kernels[name] for name in kernels if name not in replaced}:
            register(new)
        replaced.update(kernels)

    dispatcher.register_kernels = once


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """vLLM collects garbage a dozen times while an engine starts, and again when it ends: a second
    each among all that a test's process has loaded. It freezes what is there then, which here is
    an engine among others."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "freeze", "unfreeze"):
            patch.setattr(gc, name, lambda *_: 0)
        yield


@contextlib.contextmanager
def start(model: Path, kvplug: dict[str, Any] | None = None, **options: Any) -> Iterator[Engine]:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = Engine(model, kvplug, **options)
    try:
        yield engine
    finally:
        with uncollected():
            engine.llm.llm_engine.engine_core.shutdown()
            del engine.llm, engine
            cleanup_dist_env_and_memory()
        gc.collect()
        gc.freeze()  # what outlives an engine stays: the next one's end need not look at it again


@pytest.fixture(scope="session")
def engine() -> Callable[..., contextlib.AbstractContextManager[Engine]]:
    """Start an engine: ``with engine(model, {"policy": "dense"}) as stock: ...``"""
    return start
