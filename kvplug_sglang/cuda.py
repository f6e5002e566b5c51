"""The stock Triton backend, planned. Triton's interpreter runs it on a CPU, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend, logit_capping_mod
from torch import Tensor

from kvplug_sglang.attention import PlannedAttention
from kvplug_sglang.step import Whole


class KVPlugBackend(PlannedAttention, TritonAttnBackend):
    needs_cpu_seq_lens = True

    def attend(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, whole: Whole, out: Tensor
    ) -> None:
        cap = logit_capping_mod(layer.logit_capping_method, layer.logit_cap)
        if whole.longest_run == 1:
            self._decode(layer, query, keys, values, whole, out, cap)
        else:
            self._extend(layer, query, keys, values, whole, out, cap)

    def _decode(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, whole: Whole, out: Tensor,
        cap: float,
    ) -> None:  # fmt: skip
        bounds, slots = ragged(whole.slots, whole.lengths)
        partial = (*query.shape[:2], self.max_kv_splits)
        splits = torch.empty(len(query), dtype=torch.int32, device=query.device)
        self.get_num_kv_splits(splits, whole.lengths)
        self.decode_attention_fwd(
            query, keys, values, out, bounds, slots,
            query.new_empty(*partial, out.shape[2], dtype=torch.float32),
            query.new_empty(partial, dtype=torch.float32),
            splits, self.max_kv_splits, layer.scaling, 1.0, 1.0, logit_cap=cap,
        )  # fmt: skip

    def _extend(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, whole: Whole, out: Tensor,
        cap: float,
    ) -> None:  # fmt: skip
        bounds, slots = ragged(whole.slots, whole.lengths - whole.queries)
        column = torch.arange(whole.slots.shape[1], device=query.device)
        begin, end = (whole.lengths - whole.queries)[:, None], whole.lengths[:, None]
        own = whole.slots[(begin <= column) & (column < end)]  # the queries' own tokens
        self.extend_attention_fwd(
            query.contiguous(), keys[own], values[own], out, keys, values,
            starts(whole.queries), bounds, slots, None, True, None, whole.longest_run, 1.0, 1.0,
            layer.scaling, logit_cap=cap,
        )  # fmt: skip


def starts(lengths: Tensor) -> Tensor:
    """lengths [n] -> [n + 1] int32: where each of n adjacent runs begins, and the last ends."""
    bounds = lengths.new_zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    return bounds


def ragged(slots: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """slots [n, T], of which the first lengths [n] count -> bounds [n + 1] int32, and the slots
    that count side by side [n * T] int64 (what follows the last is 0). Nothing synchronises.
    """
    rows, width = slots.shape
    bounds = starts(lengths)
    column = torch.arange(width, device=slots.device)
    place = torch.where(column < lengths[:, None], bounds[:-1, None] + column, rows * width)
    packed = slots.new_zeros(rows * width + 1)
    packed.scatter_(0, place.long().flatten(), slots.flatten())
    return bounds, packed
