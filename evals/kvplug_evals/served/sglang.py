"""``sglang.launch_server``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prometheus_client.samples import Sample

from kvplug import digest_bytes, read_offer
from kvplug_evals.models.folder import served_dtype
from kvplug_evals.served.engine import NAME, Engine, MiB


@dataclass(frozen=True, kw_only=True)
class SGLang(Engine):
    title: ClassVar[str] = "SGLang"
    package: ClassVar[str] = "sglang"
    launcher: ClassVar[str] = "python -m sglang.launch_server --model-path"
    make: ClassVar[str] = "demo-sglang"
    metrics: ClassVar[tuple[str, ...]] = (
        "sglang:max_total_num_tokens",
        "sglang:kv_used_tokens",
        "sglang:num_running_reqs",
        "sglang:page_size",
    )

    preemptions: ClassVar[str] = "sglang:num_retracted_requests_total"

    chunk: int = 1024
    kv_cache_mib: int = 112

    def command(self, policy: str, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model)),
            *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
            *("--attention-backend", "kvplug", "--kvplug-policy", policy),
            *("--page-size", str(self.block_size), "--chunked-prefill-size", str(self.chunk)),
            *("--context-length", str(self.max_model_len)),
            *("--dtype", served_dtype(self.model, self.dtype)),
            *("--max-running-requests", str(self.max_num_seqs)),
            *("--max-total-tokens", str(self.pool_tokens(policy))),
            # Gauges of every step, where SGLang's own choice is every 40th.
            *("--enable-metrics", "--decode-log-interval", "1", "--enable-cache-report"),
            "--sleep-on-idle",
        ]

    def pool_tokens(self, policy: str) -> int:
        """Tokens in whole pages that the KV cache holds, beside SGLang's own page for padding.

        SGLang sizes its pool by the machine's free memory or by tokens; each policy's is to take
        the same bytes, digests included.
        """
        from transformers import AutoConfig

        model = AutoConfig.from_pretrained(self.model)
        heads = model.num_key_value_heads
        dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        item = 4 if served_dtype(self.model, self.dtype) == "float32" else 2
        pages, each = read_offer({"policy": policy}, environ={}).digest_rows(self.block_size, item)
        rows = 2 * self.block_size + pages * each
        page = model.num_hidden_layers * digest_bytes(rows, heads, dim, item)
        return (self.kv_cache_mib * MiB // page - 1) * self.block_size

    def settings(self) -> dict[str, str]:
        return {}

    def read(self, found: Mapping[str, Sample]) -> dict[str, object]:
        size = int(found["sglang:page_size"].value)
        return {
            "pool": int(found["sglang:max_total_num_tokens"].value) // size,
            "held": round(found["sglang:kv_used_tokens"].value / size),
            "running": int(found["sglang:num_running_reqs"].value),
            "fits": None,
        }

    @property
    def mode(self) -> str:
        return "overlap scheduling"
