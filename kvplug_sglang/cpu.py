"""The stock torch_native backend, planned."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor

from kvplug_kernels.virtual_heads import virtual_heads
from kvplug_sglang.attention import PlannedAttention
from kvplug_sglang.step import Selected, Whole


class KVPlugBackend(PlannedAttention, TorchNativeAttnBackend):
    def attend(
        self, layer: Any, query: Tensor, whole: Whole, out: Tensor, sinks: Tensor | None
    ) -> None:
        assert sinks is None, "the stock kernel takes none"
        keys, values = whole.cache(*self._kv(layer.layer_id))
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

    def attend_heads(
        self, layer: Any, query: Tensor, step: Selected, chosen: Tensor, counts: Tensor,
        out: Tensor, sinks: Tensor | None,
    ) -> None:  # fmt: skip
        assert sinks is None, "the stock kernel takes none"
        size, heads, group = self.engine.page_size, query.shape[1], query.shape[2]
        units, lengths = virtual_heads(
            step.page_table, chosen, counts, step.lengths, size, size * heads, 1,
            unit=step.unit, token_stride=heads,
        )  # fmt: skip
        offset = torch.arange(step.unit) * heads
        keys, values = (each.view(-1, 1, each.shape[2]) for each in self._kv(layer.layer_id))
        self._run_sdpa_forward_decode(
            query.flatten(0, 1), out.view(-1, group, out.shape[2]), keys, values,
            (units.long()[:, :, None] + offset).flatten(1), torch.arange(len(lengths)), lengths,
            scaling=layer.scaling, enable_gqa=group != 1,
        )  # fmt: skip
