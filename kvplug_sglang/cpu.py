"""The stock torch_native backend, planned."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor

from kvplug_sglang.attention import PlannedAttention
from kvplug_sglang.step import Whole


class KVPlugBackend(PlannedAttention, TorchNativeAttnBackend):
    def attend(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, whole: Whole, out: Tensor
    ) -> None:
        sequences = torch.arange(len(whole.lengths))
        more = {"scaling": layer.scaling, "enable_gqa": query.shape[1] != keys.shape[1]}
        if whole.longest_run == 1:
            self._run_sdpa_forward_decode(
                query, out, keys, values, whole.slots, sequences, whole.lengths, **more
            )
        else:
            self._run_sdpa_forward_extend(
                query, out, keys, values, whole.slots, sequences, whole.lengths,
                whole.lengths - whole.queries, whole.queries, causal=True, **more,
            )  # fmt: skip
