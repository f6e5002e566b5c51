"""Whole vLLM engines on a GPU, in this process, with and without graphs.

Where there is none, ``KVPLUG_TWIN=graphs pytest tests/gpu`` runs the same tests small over its
stand-ins (``tests/stand_ins``): that proves the tests, and nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import twin

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
CUDA = torch.cuda.is_available()


class Twin:
    """Whether the stand-ins serve here."""

    here = False


MiB = 1 << 20
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
"""Without torch.compile: graphs are what there is to test."""


def pytest_configure(config: pytest.Config) -> None:
    """Among all tests it is tests/vllm that chooses; here the folder must have been asked for."""
    asked = any("gpu" in Path(arg).parts for arg in config.args)
    if not CUDA and twin.MODE == "graphs" and asked:
        twin.install()
        Twin.here = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("default", "error:::kvplug"))
            if not (CUDA or Twin.here):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@dataclass(frozen=True)
class Sizes:
    """Tokens, on a GPU or on its twin."""

    page: int
    chunk: int
    long: int
    """Of a decode that selects among many pages."""
    beside: int
    """Of a prompt that is prefilled next to it, in several chunks."""
    lengths: tuple[int, ...]
    """Of the caches whose decode is timed."""
    steps: int
    layers: int


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    if CUDA:
        return Sizes(16, 2048, 20_000, 8_000, (8_192, 32_768, 131_072), 200, 4)
    return Sizes(32, 256, 700, 600, (300, 600), 30, 2)


class Engine:
    def __init__(self, model: Path, policy: str | None, graphs: bool, **options: Any) -> None:
        from vllm import LLM

        if policy is not None:
            options["attention_backend"] = "kvplug"
            options["additional_config"] = {"kvplug": {"policy": policy}}
        elif CUDA:
            options["attention_backend"] = "FLASH_ATTN"
        if CUDA and graphs:
            options["compilation_config"] = GRAPHS
        self.llm = LLM(
            str(model),
            **{
                "dtype": "float16" if CUDA else "float32",
                "enforce_eager": not (CUDA and graphs),  # the twin captures all the same
                "max_num_seqs": 16 if CUDA else 9,
                "kv_cache_memory_bytes": (8192 if CUDA else 256) * MiB,
                "skip_tokenizer_init": True,
                "seed": 0,
                **options,
            },
        )

    def run(self, prompts: list[list[int]], tokens: int, **sampling: Any) -> list[Any]:
        """All prompts at once, greedily -> vLLM's outputs, with the two likeliest tokens."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            **{"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 2}
            | {"max_tokens": tokens, **sampling}
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, parameters, use_tqdm=False)
        return [output.outputs[0] for output in outputs]


@pytest.fixture(scope="session")
def engine(sizes: Sizes) -> Callable[..., contextlib.AbstractContextManager[Engine]]:
    """``with engine(model, "quest(budget=64)", graphs=True) as served: ...``; None is stock."""

    @contextlib.contextmanager
    def start(
        model: Path, policy: str | None, *, graphs: bool, **options: Any
    ) -> Iterator[Engine]:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        options = {
            "block_size": sizes.page,
            "max_num_batched_tokens": sizes.chunk,
            "max_model_len": 4096,
            **options,
        }
        with contextlib.ExitStack() as capturing:
            if Twin.here and not graphs:
                import cuda_path

                capturing.enter_context(cuda_path.eagerly())
            served = Engine(model, policy, graphs, **options)
        try:
            yield served
        finally:
            served.llm.llm_engine.engine_core.shutdown()
            del served.llm, served
            cleanup_dist_env_and_memory()
            gc.collect()

    return start


@pytest.fixture(scope="session")
def held() -> Callable[[], int]:
    """Bytes of the tensors that live: the device's where there is one."""

    def measure() -> int:
        gc.collect()
        if CUDA:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    return measure
