"""``vllm serve``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prometheus_client.samples import Sample

from kvplug_evals.served.engine import NAME, Engine, MiB

STOCK = "stock"


@dataclass(frozen=True, kw_only=True)
class VLLM(Engine):
    title: ClassVar[str] = "vLLM"
    package: ClassVar[str] = "vllm"
    launcher: ClassVar[str] = "vllm serve"
    make: ClassVar[str] = "demo"
    metrics: ClassVar[tuple[str, ...]] = (
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:num_requests_running",
    )

    preemptions: ClassVar[str] = "vllm:num_preemptions_total"
    moves: ClassVar[tuple[str, ...]] = (
        "vllm:kv_offload_store_bytes_total",
        "vllm:kv_offload_load_bytes_total",
    )

    enforce_eager: bool = True
    """torch.compile would cost more at start than it saves in a run this short."""
    host: str | None = None
    """How pages lie in host memory under the prefix cache: a format of ``kvplug_vllm.host``, or
    stock for vLLM's own, which wants a GPU. None: there is none."""
    host_mib: int = 0

    def command(self, policy: str, port: int) -> list[str]:
        settings = json.dumps({"kvplug": {"policy": policy}})
        return [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)),
            *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
            *("--attention-backend", "kvplug", "--additional-config", settings),
            *("--block-size", str(self.block_size), "--enable-prefix-caching"),
            *("--enable-chunked-prefill", "--max-num-batched-tokens", str(self.chunk)),
            *("--max-model-len", str(self.max_model_len), "--dtype", self.dtype),
            *("--max-num-seqs", str(self.max_num_seqs)),
            *("--kv-cache-memory-bytes", str(self.kv_cache_mib * MiB)),
            *(["--enforce-eager"] if self.enforce_eager else []),
            *([] if self.host is None else ["--kv-transfer-config", json.dumps(self.connector)]),
            "--enable-prompt-tokens-details",
        ]

    @property
    def connector(self) -> dict[str, object]:
        extra: dict[str, object] = {"cpu_bytes_to_use": self.host_mib * MiB}
        if self.host != STOCK:
            ours = {"spec_name": "HostPages", "spec_module_path": "kvplug_vllm.host"}
            extra |= {**ours, "format": self.host}
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }

    def settings(self) -> dict[str, str]:
        # Left to itself vLLM keeps a core free, which is half of a machine of two.
        return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}

    def read(self, found: Mapping[str, Sample]) -> dict[str, object]:
        config = found["vllm:cache_config_info"].labels
        pool = int(config["num_gpu_blocks"]) - 1  # one is vLLM's own, the null block
        return {
            "pool": pool,
            "held": round(found["vllm:kv_cache_usage_perc"].value * pool),
            "running": int(found["vllm:num_requests_running"].value),
            "fits": float(config["kv_cache_max_concurrency"]),
        }

    @property
    def mode(self) -> str:
        return "eager" if self.enforce_eager else "torch.compile"
