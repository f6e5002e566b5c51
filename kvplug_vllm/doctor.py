"""Whether kvplug would work here, found out by doing."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import kvplug
from kvplug import parse, read_offer, read_settings
from kvplug.doctor import Check
from kvplug_vllm import compat
from kvplug_vllm.settings import NAME, offer_of


def examine(model: str | None, policy: str | None) -> Iterator[Check]:
    """Every check; one that raises has failed, and its error says why."""
    yield Check.of("versions", _versions)
    yield Check.of("device", _device)
    yield Check.of("default policy", lambda: str(read_settings()))
    yield Check.of("backend name", _backend_name)
    yield Check.of("worker start", _unpickles_before_plugins)
    yield Check.of("platform", _platform)
    yield Check.of("cache specs", _specs)
    yield Check.of("request rows", _router)
    yield Check.of("serving path", _serving)
    if policy is not None:
        yield Check.of("policy", lambda: str(parse(policy)))
    if model is not None:
        yield Check.of("model", lambda: _model(model, policy))


def _versions() -> str:
    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    found = of("vllm")
    if not compat.supported():
        raise ValueError(
            f"kvplug was tested with vllm 0.32 and 0.33, got {found}: "
            "pip install 'vllm>=0.32,<0.34'"
        )
    return f"kvplug {kvplug.__version__}, vllm {found}, torch {torch.__version__}"


def _device() -> str:
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ValueError(
            f"kvplug runs on CUDA and on the CPU, not on {current_platform.device_name}"
        )
    return f"{current_platform.get_device_name()} ({current_platform.device_type})"


def _backend_name() -> str:
    from vllm.config.attention import AttentionConfig

    from kvplug_vllm import register

    register()
    register()
    backend = AttentionConfig(backend=NAME.lower()).backend
    assert backend is not None
    return f"--attention-backend kvplug is {backend.get_class().__name__}"


def _unpickles_before_plugins() -> str:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = pickle.dumps(AttentionBackendEnum[NAME])
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"
    done = subprocess.run([sys.executable, "-c", code], input=member, capture_output=True)
    if done.returncode:
        raise ValueError(done.stderr.decode().strip().splitlines()[-1])
    return "a spawned worker understands the choice before its plugins load"


def _platform() -> str:
    from vllm.platforms import current_platform

    cls = type(current_platform)
    if current_platform.is_cpu() and not getattr(cls.get_attn_backend_cls, "_kvplug", False):
        raise ValueError(
            f"{cls.__name__} ignores --attention-backend, and kvplug is not hooked in"
        )
    return cls.__name__


def _specs() -> str:
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from kvplug_vllm.settings import EvictionSettings
    from kvplug_vllm.streaming import EvictingManager, EvictingSpec

    shape: dict[str, Any] = {
        "block_size": 32, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32,
    }  # fmt: skip
    settings = EvictionSettings.of(read_offer({"policy": "streaming_llm"}))
    ours = EvictingSpec(**shape, settings=settings, in_flight=64)
    if KVCacheSpecRegistry.get_manager_class(ours) is not EvictingManager:
        raise ValueError("vLLM does not know kvplug's cache manager")
    if KVCacheSpecRegistry.get_manager_class(FullAttentionSpec(**shape)) is None:
        raise ValueError("vLLM has lost its own cache managers")
    return "vLLM's own managers and kvplug's are registered"


def _router() -> str:
    from kvplug_vllm.router import Router

    if Router.__abstractmethods__:
        raise ValueError(
            f"vLLM asks its logits processors for {sorted(Router.__abstractmethods__)}"
        )
    return "speaks to Model Runner V1 and V2"


def _serving() -> str:
    """What would run a step here, under the engine's own defaults."""
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    config = VllmConfig()
    runner = "Model Runner V2" if config.use_v2_model_runner else "Model Runner V1"
    mode = config.compilation_config.cudagraph_mode
    graphs = "no CUDA graphs" if mode is None or not mode.value else f"CUDA graphs {mode.name}"
    return f"{runner}, {graphs}, over {_kernel(current_platform.is_cuda())}; {on_a_gpu()}"


def _kernel(cuda: bool) -> str:
    if not cuda:
        return "CPU_ATTN"
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return f"FLASH_ATTN, version {get_flash_attn_version()}"


def on_a_gpu() -> str:
    """What the results that lie beside the source say; a wheel carries none."""
    found = sorted((Path(kvplug.__file__).parents[1] / "results" / "gpu").glob("*.json"))
    names = sorted({str(json.loads(each.read_text()).get("gpu", each.stem)) for each in found})
    return f"run on {', '.join(names)}" if names else "never run on a GPU"


def _model(model: str, policy: str | None) -> str:
    from vllm.engine.arg_utils import EngineArgs

    from kvplug_vllm.refusals import refuse

    settings = {} if policy is None else {"kvplug": {"policy": policy}}
    config = EngineArgs(
        model=model, attention_backend=NAME.lower(), additional_config=settings
    ).create_engine_config()
    refuse(config)
    return f"{model} can be served with {offer_of(config)}"
