"""An engine by its name: the one file that knows both."""

from __future__ import annotations

from collections.abc import Callable

from kvplug_evals.engines.interface import Engine, EngineError, EngineOptions


def start_engine(engine: str, policy: str, options: EngineOptions) -> Engine:
    """Raises EngineError that says what to do."""
    start: Callable[[str, EngineOptions], Engine]
    try:
        if engine == "vllm":
            from kvplug_evals.engines.vllm import VLLMEngine

            start = VLLMEngine
        elif engine == "sglang":
            from kvplug_evals.engines.sglang import SGLangEngine

            start = SGLangEngine
        else:
            raise EngineError(f"--engine must be vllm or sglang, got {engine!r}")
    except ModuleNotFoundError as error:
        raise EngineError(
            f"--engine {engine} needs {error.name}; install it with: pip install "
            f"'kvplug[{engine}]'"
        ) from None
    return start(policy, options)
