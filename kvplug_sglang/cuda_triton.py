"""The stock Triton backend, planned. Triton's interpreter runs it on a CPU, in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend, logit_capping_mod
from torch import Tensor

from kvplug_kernels.slot_lists import slot_lists
from kvplug_sglang.cuda import ReplayedAttention, with_sinks
from kvplug_sglang.step import Selected, Whole

SEQUENCES = 256
"""That the stock kernel plans splits for at least: fewer would compile it anew."""


class KVPlugBackend(ReplayedAttention, TritonAttnBackend):
    def attend(
        self, layer: Any, query: Tensor, whole: Whole, out: Tensor, sinks: Tensor | None
    ) -> None:
        keys, values = whole.cache(*self._kv(layer.layer_id))
        if whole.longest_run == 1:
            weights = query.new_empty(*query.shape[:2], self.max_kv_splits, dtype=torch.float32)
            self._decode(
                layer, query, keys, values, whole.seen, whole.lengths, out, weights, sinks
            )
            return
        bounds, slots = whole.before
        cap = logit_capping_mod(layer.logit_capping_method, layer.logit_cap)
        self.extend_attention_fwd(
            query.contiguous(), keys[whole.own], values[whole.own], out, keys, values,
            whole.starts, bounds, slots, None, True, None, whole.longest_run, 1.0, 1.0,
            layer.scaling, logit_cap=cap, sinks=sinks,
        )  # fmt: skip

    def attend_heads(
        self, layer: Any, query: Tensor, step: Selected, chosen: Tensor, counts: Tensor,
        out: Tensor, sinks: Tensor | None,
    ) -> None:  # fmt: skip
        bounds, slots = slot_lists(
            step.page_table, step.lengths, self.engine.page_size, chosen, counts, step.unit
        )
        keys, values = (each.view(-1, 1, each.shape[2]) for each in self._kv(layer.layer_id))
        out = out.view(-1, query.shape[2], out.shape[2])
        read, rows = (bounds, slots), query.flatten(0, 1)
        weights = query.new_empty(*rows.shape[:2], self.max_kv_splits, dtype=torch.float32)
        if sinks is not None:
            weights.fill_(-torch.inf)  # of parts that there are none of
        self._decode(layer, rows, keys, values, read, bounds.diff(), out, weights)
        if sinks is not None:
            with_sinks(out, weights.logsumexp(2), sinks)

    def _decode(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor,
        read: tuple[Tensor, Tensor], lengths: Tensor, out: Tensor, weights: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """weights [n, Hq, parts] takes the logarithm of what each part weighs."""
        self.decode_attention_fwd(
            query, keys, values, out, *read,
            query.new_empty(*weights.shape, out.shape[2], dtype=torch.float32), weights,
            self.splits(lengths, query.shape[1], keys.shape[1]), self.max_kv_splits,
            layer.scaling, 1.0, 1.0,
            logit_cap=logit_capping_mod(layer.logit_capping_method, layer.logit_cap),
            sinks=sinks,
        )  # fmt: skip

    def splits(self, lengths: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Parts that each sequence is read in. [n] int32

        As the stock ``get_num_kv_splits``, which takes every sequence to have the model's heads:
        a sequence of one KV head is 1 / H of that work, and wants as many more parts.
        """
        found = torch.empty_like(lengths)
        if self.static_kv_splits or self.device_core_count <= 0:
            return found.fill_(self.max_kv_splits)
        most = max(SEQUENCES, triton.next_power_of_2(len(lengths)))
        get_num_kv_splits_triton[(1,)](
            found, lengths, len(lengths), 1, heads, kv_heads, self.max_kv_splits,
            self.device_core_count, MAX_NUM_SEQ=most, uneven_batch_ptr=None,
        )  # fmt: skip
        return found
